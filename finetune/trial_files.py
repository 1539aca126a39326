"""What a trial leaves on the way: checkpoints, from which it goes on when it was interrupted, and TensorBoard files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from common.folders import atomic_path

if TYPE_CHECKING:  # slow to import, and few trials write events
    from torch.utils.tensorboard import SummaryWriter

_CHECKPOINT: Final = "checkpoint.pt"


class TrialFiles:
    """The files of one trial.

    Args:
        folder: the trial's own; made when the first file is written.
        save_steps: optimizer steps between two checkpoints, beside the one after each epoch; None: no checkpoints.
        logging_steps: optimizer steps between two points of the training loss in TensorBoard; None: no events.
    """

    def __init__(self, folder: Path, save_steps: int | None, logging_steps: int | None) -> None:
        self.save_steps, self.logging_steps = save_steps, logging_steps
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none."""
        path = self._folder / _CHECKPOINT
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by ``state``: tensors, numbers and texts in dictionaries and lists.

        Raises:
            OSError: it can't be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._folder / _CHECKPOINT) as temporary:
            try:
                torch.save(dict(state), temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(str(error).splitlines()[0]) from None

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of these curves; what an interrupted start wrote from ``step`` on is dropped."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        """The trial's result is recorded: what it could go on from is not needed any more."""
        if self._writer is not None:
            self._writer.close()
        (self._folder / _CHECKPOINT).unlink(missing_ok=True)
