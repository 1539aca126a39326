"""Checkpoints: DeepSpeed's files and our own beside them, written aside, renamed, and only then pointed at.

A checkpoint needs nothing outside itself to become a model folder: the tokenizer and the run's record are in it.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.folders import CONFIG_FILE, errors_of_writing, read_json, require_folder, write_json, write_text
from data_prep.shards import TOKENIZER_FOLDER
from pretrain.weight_files import check_whole

if TYPE_CHECKING:  # what only reads a checkpoint does without DeepSpeed
    from pretrain.engine import PretrainEngine

_CHECKPOINTS_FOLDER = "checkpoints"
RECORD_FILE = "pretraining.json"
_LATEST_FILE, _BEST_FILE = "latest", "best"
_STATE_FILE = "state.json"
_WRITING = "writing"
_PREFIX = "step-"
_NOT_OURS = "this is not a checkpoint of ours"


@dataclass(frozen=True)
class Setting:
    """What a checkpoint can be resumed with."""

    manifest_sha256: str
    """The data that the position refers to."""
    architecture: dict[str, Any]
    """All numbers of the model."""
    optimizer: str
    """Whose state goes on."""
    zero_stage: int
    """DeepSpeed's: stage 0 checkpoints load on any number of processes, sharded ones on the same number only."""
    world_size: int


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; with the weights and the optimizer's state this is all that a resume needs."""

    step: int
    """Optimizer steps done."""
    sequences_seen: int
    """Training rows consumed, which is the position in the data."""
    skipped_steps: int
    """Without an update, because fp16 gradients overflowed; their rows are consumed."""
    spent_seconds: dict[str, float]
    """Of the budget, by activity."""
    micro_batch_size: int
    durations: dict[str, float]
    """How long things took lately, in seconds: ``starting``, ``first_step``, ``step``, ``validate``, ``save``,
    ``export``."""
    validation_loss: float | None
    """Of these very weights, where they have been validated."""
    best: dict[str, float]
    """The best loss so far by metric, which rules for an early stop go by."""
    stopped_early: str | None
    """The rule that has ended the run, where one has: only the closing is left."""
    setting: Setting
    validation_due: bool = False
    """Whether a validation was due here and was given up: the next start makes it."""

    @property
    def elapsed_seconds(self) -> float:
        """Budget spent."""
        return sum(self.spent_seconds.values())


class Checkpoints:
    """The checkpoints of one run: the newest ``keep`` of them, and the best of those with a validation loss.

    Args:
        output_dir: the run's folder.
        tokenizer_folder: the data's, which every checkpoint gets a copy of.
        keep: how many stay.
        rank: of this process.
        resumed: the one that the run goes on from, its own or another run's.
    """

    def __init__(
        self, output_dir: Path, tokenizer_folder: Path, keep: int, rank: int, resumed: Path | None = None
    ) -> None:
        self._output_dir = output_dir
        self._folder = output_dir / _CHECKPOINTS_FOLDER
        self._tokenizer_folder = tokenizer_folder
        self._keep = keep
        self._rank = rank
        # Remembered, not read: a shared folder may show ranks on other machines what was there before.
        self._saved_step = int(resumed.name.removeprefix(_PREFIX)) if resumed and self.owns(resumed) else None
        if rank == 0:
            shutil.rmtree(self._folder / _WRITING, ignore_errors=True)  # of a start that was killed

    def owns(self, checkpoint: Path) -> bool:
        """Whether it is one of this run, by its name alone."""
        return checkpoint.parent == self._folder

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return latest_checkpoint(self._output_dir)

    def save(
        self, engine: "PretrainEngine", step: int, state: Callable[[], TrainState], record: dict[str, Any]
    ) -> bool:
        """Write a checkpoint; every rank calls it. A kill at any moment leaves the one before in place.

        Args:
            engine: whose weights and optimizer.
            step: of the run.
            state: asked when all else is written, so that the time of writing is in it.
            record: tells, as JSON, how the run has gone so far; the exported model gets it.

        Returns:
            False where that step is saved already.
        """
        if self._saved_step == step:
            return False
        with errors_of_writing(self._output_dir):
            self._write(_name(step), engine, state, record)
        self._saved_step = step
        return True

    def _write(
        self, name: str, engine: "PretrainEngine", state: Callable[[], TrainState], record: dict[str, Any]
    ) -> None:
        barrier = engine.processes.barrier
        if self._rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        barrier()
        engine.save(self._folder, _WRITING)
        barrier()
        if self._rank == 0:
            self._finish(name, state, record)
        barrier()

    def _finish(self, name: str, state: Callable[[], TrainState], record: dict[str, Any]) -> None:
        copy_files(self._tokenizer_folder, self._folder / _WRITING / TOKENIZER_FOLDER)
        if (config := self._output_dir / CONFIG_FILE).exists():
            shutil.copyfile(config, self._folder / _WRITING / CONFIG_FILE)
        write_json(self._folder / _WRITING / RECORD_FILE, record)
        write_json(self._folder / _WRITING / _STATE_FILE, asdict(state()))
        for path in self._folder.glob(f"{_PREFIX}*"):
            if path.name >= name:  # of a start that was killed before it could point there
                shutil.rmtree(path)
        (self._folder / _WRITING).rename(self._folder / name)
        write_text(self._folder / _LATEST_FILE, name + "\n")
        self._compare_with_best(self._folder / name)
        self._remove_old()

    def _compare_with_best(self, checkpoint: Path) -> None:
        best = best_checkpoint(self._output_dir)
        if _validation_loss(checkpoint) < (_validation_loss(best) if best else math.inf):
            write_text(self._folder / _BEST_FILE, checkpoint.name + "\n")

    def set_validation_loss(self, loss: float) -> None:
        """Tell the newest checkpoint what its weights have come to; rank 0 alone calls it."""
        newest = self.latest()
        write_json(newest / _STATE_FILE, asdict(replace(read_state(newest), validation_loss=loss)))
        self._compare_with_best(newest)

    def update_record(self, record: dict[str, Any]) -> None:
        """Put what has been learnt since into the newest checkpoint; rank 0 alone calls it."""
        if newest := self.latest():
            write_json(newest / RECORD_FILE, record)

    def _remove_old(self) -> None:
        newest_last = sorted(self._folder.glob(f"{_PREFIX}*"))
        best = best_checkpoint(self._output_dir)
        for path in newest_last[: -self._keep]:
            if path != best:
                shutil.rmtree(path)


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of the run in ``output_dir``, or None."""
    return _pointed_at(output_dir / _CHECKPOINTS_FOLDER / _LATEST_FILE)


def best_checkpoint(output_dir: Path) -> Path | None:
    """The one with the lowest validation loss among those that were saved right after a validation, or None."""
    best = _pointed_at(output_dir / _CHECKPOINTS_FOLDER / _BEST_FILE)
    return best if best and best.exists() else None  # a kill may leave it behind a resume from an earlier step


def _pointed_at(pointer: Path) -> Path | None:
    return pointer.parent / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


def _validation_loss(checkpoint: Path) -> float:
    loss = read_state(checkpoint).validation_loss
    return math.inf if loss is None else loss


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of one folder into another, contents alone: what can't be written there can be written here."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def find_checkpoint(folder: Path) -> Path:
    """``folder`` if it is a checkpoint, the newest one of a run's folder, or what ``latest`` or ``best`` point at.

    Raises:
        UserError: it is nothing of these.
    """
    if folder.is_file() and folder.name in (_LATEST_FILE, _BEST_FILE):
        folder = _pointed_at(folder)
    require_folder(folder, "checkpoint")
    newest = latest_checkpoint(folder)
    if newest is None and not (folder / _STATE_FILE).exists():
        raise UserError(f"{folder} is no checkpoint (it has no {_STATE_FILE}) and no run's folder that has one")
    return newest or folder


def read_state(checkpoint: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    content = read_json(checkpoint / _STATE_FILE, _NOT_OURS)
    try:
        return TrainState(**{**content, "setting": Setting(**content["setting"])})
    except (TypeError, KeyError):
        raise UserError(f"{checkpoint / _STATE_FILE}: {_NOT_OURS}") from None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """How the run had gone when the checkpoint was written.

    Raises:
        UserError: the record is missing or damaged.
    """
    record = read_json(checkpoint / RECORD_FILE, _NOT_OURS)
    if not isinstance(record, dict):
        raise UserError(f"{checkpoint / RECORD_FILE}: {_NOT_OURS}")
    return record


def check_resumable(checkpoint: Path, saved: Setting, now: Setting) -> None:
    """Refuse to go on from a checkpoint that was saved with another ``Setting``.

    Raises:
        UserError: data, architecture or the way the optimizer's state is sharded differ, or a file is damaged.
    """
    check_whole(checkpoint, saved.zero_stage, saved.world_size)
    if saved.manifest_sha256 != now.manifest_sha256:
        raise UserError(
            f"{checkpoint} was trained on another data folder: give that --data_dir, or another --output_dir"
        )
    if saved.architecture != now.architecture:
        different = [name for name, value in now.architecture.items() if saved.architecture.get(name) != value]
        raise UserError(f"{checkpoint} is of another architecture: {', '.join(different)} differ")
    if saved.optimizer != now.optimizer:
        raise UserError(f"{checkpoint} holds the state of optimizer {saved.optimizer}: {now.optimizer} can't go on")
    if saved.zero_stage != now.zero_stage:
        raise UserError(
            f"{checkpoint} was saved at ZeRO stage {saved.zero_stage}, ds_config has stage {now.zero_stage}"
        )
    if saved.zero_stage and saved.world_size != now.world_size:
        raise UserError(
            f"{checkpoint} was saved by {saved.world_size} processes at ZeRO stage {saved.zero_stage}, a part each: "
            f"start {saved.world_size} processes, not {now.world_size}"
        )


def load_weights(engine: "PretrainEngine", checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer state into the engine; every rank calls it."""
    engine.load(checkpoint.parent, checkpoint.name)
