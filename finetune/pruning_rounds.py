"""The rounds of a pruning: heads are chosen and removed, the rest is fine-tuned again, and all of it is recorded.

Each round of each seed has a folder. ``choice.json`` (the heads) is written first, ``round.json`` (the result) last;
of a seed's rounds only the newest one's model is kept.
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from common.errors import UserError
from common.folders import atomic_path, read_json, write_json
from common.hub import save, weight_files
from finetune.batches import DeviceSplit
from finetune.classifier import load_classifier
from finetune.heads import kept_heads, remove_heads, removed_heads, write_pruned_heads
from finetune.losses import TrialFailure
from finetune.pruning import POINTS, Choice, PrunedStart, choose_heads, hold_out
from finetune.tasks import Task
from finetune.tokens import TokenizedSplit
from finetune.trial import Cell, Protocol, run_trial
from finetune.trial_files import TrialFiles

_MODEL_FOLDER: Final = "model"
_CHOICE_FILE: Final = "choice.json"
_ROUND_FILE: Final = "round.json"
_SAVE_STEPS: Final = 500  # optimizer steps between two checkpoints

State = dict[str, Any]
"""A model's heads, parameters, bytes and scores, and how it came to them."""


def state_of(
    classifier: PreTrainedModel, folder: Path, task: Task, metrics: Mapping[str, Mapping[str, float]]
) -> State:
    """What tables and figures tell of a model.

    Args:
        classifier: the model.
        folder: where its weights lie.
        task: its task.
        metrics: of each evaluation split.

    Returns:
        ``num_heads``, ``removed`` (layer, as a text, -> heads that it lacks), ``parameters``, ``file_bytes`` (of the
        weights), ``score`` (a fraction) and ``metrics``.
    """
    return {
        "num_heads": sum(map(len, kept_heads(classifier).values())),
        "removed": {str(layer): heads for layer, heads in removed_heads(classifier).items()},
        "parameters": classifier.num_parameters(),
        "file_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "score": metrics[task.evaluation_splits[0]][task.selected_by],
        "metrics": metrics,
    }


@dataclass(frozen=True)
class PruningRounds:
    """All rounds of all seeds of one pruning, counted from 1; round 0 is the model as it was."""

    folder: Path
    """Holds the rounds' folders."""
    model: PreTrainedModel
    """As it was tuned, on ``device``."""
    task: Task
    cell: Cell
    """How a round fine-tunes, but for the seed."""
    protocol: Protocol
    tolerance: float
    """Points that a round's removal may cost on the held-out rows."""
    holdout: float
    """Share of the training rows that is held out."""
    training: TokenizedSplit
    """All training rows."""
    evaluation: Mapping[str, DeviceSplit]
    device: torch.device

    def is_recorded(self, seed: int, number: int) -> bool:
        """Whether a round has its result."""
        return (self._folder_of(seed, number) / _ROUND_FILE).exists()

    def read(self, seed: int, number: int) -> State:
        """The result of a recorded round: ``round`` and ``choice``, and, where that has any heads, the state."""
        return read_json(self._folder_of(seed, number) / _ROUND_FILE, "a round's result; delete its folder")

    def classifier(self, seed: int, number: int) -> PreTrainedModel:
        """As a round left it; 0: as it was."""
        if number == 0:
            return self.model
        return load_classifier(self._folder_of(seed, number) / _MODEL_FOLDER).to(self.device)

    def run(self, seed: int, number: int) -> State:
        """Choose heads, remove them, fine-tune; the model is saved, then the result, then the round before's goes."""
        folder = self._folder_of(seed, number)
        classifier = self.classifier(seed, number - 1)
        parts = hold_out(self.training, self.holdout, seed)
        training, held_out = (DeviceSplit(part, self.device) for part in parts)
        choice = self._choose(folder, classifier, training, held_out)
        found = {"round": number, "choice": asdict(choice)}
        if choice.heads:
            smaller = copy.deepcopy(classifier)
            remove_heads(smaller, choice.heads)
            found |= self._tune(folder, seed, smaller, training)
        write_json(folder / _ROUND_FILE, found)
        if choice.heads and number > 1:
            shutil.rmtree(self._folder_of(seed, number - 1) / _MODEL_FOLDER)
        return self.read(seed, number)  # as a later start reads it

    def _choose(
        self, folder: Path, classifier: PreTrainedModel, training: DeviceSplit, held_out: DeviceSplit
    ) -> Choice:
        """Made once: a round that goes on from a checkpoint has the shapes that it had."""
        path = folder / _CHOICE_FILE
        if path.exists():
            return Choice.of(read_json(path, "the heads that the round removes; delete its folder"))
        try:
            choice = choose_heads(classifier, self.task, training, held_out, self.tolerance, self.cell.precision)
        except TrialFailure as error:
            raise UserError(f"{folder}: {error}") from None
        write_json(path, asdict(choice))
        num_heads = sum(map(len, choice.heads.values()))
        cost = POINTS * (choice.held_out_scores[0] - choice.held_out_scores[num_heads])
        print(
            f"{folder}: {num_heads} heads can go, at a cost of {cost:.1f} points on {len(held_out):,} rows", flush=True
        )
        return choice

    def _tune(self, folder: Path, seed: int, classifier: PreTrainedModel, training: DeviceSplit) -> dict[str, Any]:
        cell, files = replace(self.cell, seed=seed), TrialFiles(folder, _SAVE_STEPS, logging_steps=None)
        protocol, data = self.protocol, {"train": training, **self.evaluation}
        try:
            result, tuned = run_trial(self.task, cell, protocol, PrunedStart(classifier), data, self.device, files)
        except TrialFailure as error:
            raise UserError(f"{folder}: {error}") from None
        with atomic_path(folder / _MODEL_FOLDER) as temporary:
            save(temporary, tuned)
            write_pruned_heads(temporary, tuned)
        files.end()
        metrics = result["epochs"][result["score_epoch_index"]]["metrics"]
        kept = {name: result[name] for name in ("epochs", "seconds", "device")}
        return {**state_of(tuned, folder / _MODEL_FOLDER, self.task, metrics), **kept, "training_rows": len(training)}

    def _folder_of(self, seed: int, number: int) -> Path:
        return self.folder / f"seed-{seed}" / f"round-{number}"
