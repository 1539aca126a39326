"""The models that a grid keeps: those of each task's best configuration, one per seed."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.folders import atomic_path, file_lock
from common.hub import quiet_transformers
from finetune.selection import best_cells, may_be_best, median_cell
from finetune.trial import Cell

MODELS_FOLDER: Final = "models"


def kept_folder(output_dir: Path, cell: Cell) -> Path:
    """Where the model of ``cell`` lies while it is kept: a Hugging Face folder."""
    return _configuration_folder(output_dir, cell) / f"seed-{cell.seed}"


def _configuration_folder(output_dir: Path, cell: Cell) -> Path:
    name = f"{cell.initialization}-lr{cell.learning_rate}-batch{cell.batch_size}-epochs{cell.num_epochs}"
    return output_dir / MODELS_FOLDER / cell.task_name / name


class KeptModels:
    """The models of one task and one start.

    Args:
        output_dir: the grid's.
        cells: the task's cells of that start.
    """

    def __init__(self, output_dir: Path, cells: Sequence[Cell]) -> None:
        self._output_dir, self._cells = output_dir, cells

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that keeps or removes the task's models: what one saves, another may want to remove."""
        folder = self._output_dir / MODELS_FOLDER / self._cells[0].task_name
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock"):
            yield

    def keep(
        self,
        cell: Cell,
        scores: Mapping[Cell, float],
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Save a trained classifier, unless its configuration can't become the best; whole or not at all.

        Args:
            cell: what was run.
            scores: of the finished cells, this one included.
            classifier: saved in float32 as safetensors.
            tokenizer: saved beside it.
        """
        if cell.configuration not in may_be_best(self._cells, scores):
            return
        with quiet_transformers(), atomic_path(kept_folder(self._output_dir, cell)) as temporary:
            classifier.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    def prune(self, scores: Mapping[Cell, float]) -> None:
        """Remove the models of configurations that can't become the best."""
        candidates = may_be_best(self._cells, scores)
        for cell in self._cells:
            folder = _configuration_folder(self._output_dir, cell)
            if cell.configuration not in candidates and folder.exists():
                shutil.rmtree(folder)

    def median_model(self, scores: Mapping[Cell, float]) -> Path | None:
        """The folder of the best configuration's median seed; None while a cell has no score."""
        if any(cell not in scores for cell in self._cells):
            return None
        return kept_folder(self._output_dir, median_cell(best_cells(self._cells, scores), scores))


def groups_by_start(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """One task's cells by what they start from."""
    starts = dict.fromkeys(cell.initialization for cell in cells)
    return {start: [cell for cell in cells if cell.initialization == start] for start in starts}
