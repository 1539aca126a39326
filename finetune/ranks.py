"""Ranks that a launcher (deepspeed, torchrun) started: each runs trials, and rank 0 prepares and reports for all."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch.distributed as dist

from common.errors import UserError

_LONGEST_PREPARATION: Final = timedelta(hours=6)  # downloads and tokenising, which rank 0 does alone


@dataclass(frozen=True)
class Ranks:
    """This process among those that the launcher started; the only one where there was no launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this machine."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, so that it has one GPU and not all of them."""
        return self.world_size > 1

    @property
    def coordinates(self) -> bool:
        """Whether this is the process that prepares and reports."""
        return self.rank == 0

    def after_rank_0(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Have rank 0 prepare, and all others wait until it has.

        Raises:
            UserError: on rank 0 what ``prepare`` raises; on others, rank 0 ended without having prepared.
        """
        if not self.launched:
            prepare()
            return
        with self._meeting():
            dist.init_process_group("gloo", timeout=_LONGEST_PREPARATION)
        if self.coordinates:
            prepare()
        with self._meeting():
            dist.barrier()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's errors of stores and connections
            reason = str(error).splitlines()[0]
            raise UserError(f"rank {self.rank} of {self.world_size} has lost the others ({reason})") from None


def this_rank() -> Ranks:
    """What the launcher's environment variables say."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size  # torchrun's, deepspeed's
    return Ranks(int(os.environ.get("RANK", "0")), world_size, int(os.environ.get("LOCAL_RANK", "0")), int(local))
