"""Checkpoints: DeepSpeed's files and our own state beside them, written aside, renamed, and only then pointed at."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.folders import read_json, write_json, write_text
from pretrain.engine import PretrainEngine

_LATEST_FILE = "latest"
_STATE_FILE = "state.json"
_WRITING = "writing"


@dataclass(frozen=True)
class Setting:
    """What a checkpoint can be resumed with."""

    manifest_sha256: str
    """The data that the position refers to."""
    architecture: dict[str, Any]
    """All numbers of the model."""
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
    elapsed_seconds: float
    """Budget spent."""
    micro_batch_size: int
    step_seconds: float
    """How long the latest steps took."""
    setting: Setting


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them."""

    def __init__(self, folder: Path, keep: int, rank: int) -> None:
        self._folder = folder
        self._keep = keep
        self._rank = rank

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self._folder / _LATEST_FILE
        return self._folder / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None

    def save(self, engine: PretrainEngine, state: TrainState) -> None:
        """Write a checkpoint; every rank calls it. A kill at any moment leaves the one before in place."""
        name = f"step-{state.step:08d}"
        if self.latest() == self._folder / name:
            return
        if self._rank == 0:
            shutil.rmtree(self._folder / _WRITING, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        engine.save(self._folder, _WRITING)
        engine.barrier()
        if self._rank == 0:
            write_json(self._folder / _WRITING / _STATE_FILE, asdict(state))
            for path in self._folder.glob("step-*"):
                if path.name >= name:  # of a start that was killed before it could point there
                    shutil.rmtree(path)
            (self._folder / _WRITING).rename(self._folder / name)
            write_text(self._folder / _LATEST_FILE, name + "\n")
            self._remove_old()
        engine.barrier()

    def _remove_old(self) -> None:
        newest_last = sorted(self._folder.glob("step-*"))
        for path in newest_last[: -self._keep]:
            shutil.rmtree(path)


def read_state(checkpoint: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    advice = "this is not a checkpoint of ours"
    content = read_json(checkpoint / _STATE_FILE, advice)
    try:
        return TrainState(**{**content, "setting": Setting(**content["setting"])})
    except (TypeError, KeyError):
        raise UserError(f"{checkpoint / _STATE_FILE}: {advice}") from None


def check_resumable(checkpoint: Path, saved: Setting, now: Setting) -> None:
    """Refuse to go on from a checkpoint that was saved with another ``Setting``.

    Raises:
        UserError: data, architecture or the way the optimizer's state is sharded differ.
    """
    if saved.manifest_sha256 != now.manifest_sha256:
        raise UserError(
            f"{checkpoint} was trained on another data folder: give that --data_dir, or another --output_dir"
        )
    if saved.architecture != now.architecture:
        different = [name for name, value in now.architecture.items() if saved.architecture.get(name) != value]
        raise UserError(f"{checkpoint} is of another architecture: {', '.join(different)} differ")
    if saved.zero_stage != now.zero_stage:
        raise UserError(
            f"{checkpoint} was saved at ZeRO stage {saved.zero_stage}, ds_config has stage {now.zero_stage}"
        )
    if saved.zero_stage and saved.world_size != now.world_size:
        raise UserError(
            f"{checkpoint} was saved by {saved.world_size} processes at ZeRO stage {saved.zero_stage}, a part each: "
            f"start {saved.world_size} processes, not {now.world_size}"
        )


def load_weights(engine: PretrainEngine, checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer state into the engine; every rank calls it."""
    engine.load(checkpoint.parent, checkpoint.name)
