"""The models that a grid keeps: those of each task's best configuration, one per seed."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.folders import atomic_path, file_lock
from common.hub import save
from finetune.heads import write_pruned_heads
from finetune.model_record import ModelRecord, copy_pretraining, write_record
from finetune.selection import best_cells, may_be_best, median_cell
from finetune.trial import Cell

MODELS_FOLDER: Final = "models"
TRIALS_FOLDER: Final = "trials"


def trial_folder(output_dir: Path, cell: Cell) -> Path:
    """Where the trial of ``cell`` keeps checkpoints and TensorBoard files."""
    return output_dir / TRIALS_FOLDER / cell.task_name / _configuration_slug(cell) / f"seed-{cell.seed}"


def _configuration_slug(cell: Cell) -> str:
    """A folder's name for all that tells the cell from others of its task, but for the seed."""
    variant = re.sub(r"[^a-z0-9.]+", "-", cell.variant.lower())
    return f"{cell.initialization}-{variant}-lr{cell.learning_rate}-batch{cell.batch_size}-epochs{cell.num_epochs}"


def kept_folder(output_dir: Path, cell: Cell) -> Path:
    """Where the model of ``cell`` lies while it is kept: a Hugging Face folder."""
    return _configuration_folder(output_dir, cell) / f"seed-{cell.seed}"


def _configuration_folder(output_dir: Path, cell: Cell) -> Path:
    return output_dir / MODELS_FOLDER / cell.task_name / _configuration_slug(cell)


class KeptModels:
    """The models of one task and one group.

    Args:
        output_dir: the grid's.
        cells: the task's cells of that group.
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
        record: ModelRecord,
    ) -> None:
        """Save a trained classifier, unless its configuration can't become the best; whole or not at all.

        Args:
            cell: what was run.
            scores: of the finished cells, this one included.
            classifier: saved in float32 as safetensors, with the record of its pruned heads if it lacks any.
            tokenizer: saved beside it.
            record: how it was made; saved beside it.
        """
        if cell.configuration not in may_be_best(self._cells, scores):
            return
        with atomic_path(kept_folder(self._output_dir, cell)) as temporary:
            save(temporary, classifier, tokenizer)
            write_pruned_heads(temporary, classifier)
            write_record(temporary, record)
            copy_pretraining(Path(record.base_model_path), temporary)

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
