"""One machine's part of a search: launch runs at its places, watch them, record what becomes of them.

It holds nothing that the storage and the runs' folders don't hold. A coordinator that is killed takes its runs with it,
which save and leave; the next one goes on.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from common.errors import UserError
from common.folders import file_lock
from pretrain.checkpoint import latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.interruptions import SLURM_END, Interruptions
from pretrain.launch import Launch, Outcome, RunFolder, cause_of, read_outcome
from pretrain.places import Place
from pretrain.run_record import COMPLETE, PAUSE, lost_seconds, read_metrics
from pretrain.sampling import is_pruned
from pretrain.search_config import SearchConfig
from pretrain.search_runs import SearchRun
from pretrain.study import SearchStore
from pretrain.summary import DIVERGED, read_summary

CHECKPOINTS_FOLDER: Final = "checkpoints"
MAX_KILLS: Final = 10  # in a row, no further than before: a person kills at random, a system short of memory for ever
MAX_ERRORS: Final = 2  # likewise
MAX_FAILURES: Final = 3  # of different runs in a row, none getting any further: then it is no fault of theirs
_POLL_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 3.0
_ORPHANS_SECONDS: Final = 600.0
_CANNOT_WRITE: Final = "can't write to"
_KILLED: Final = "killed"


@dataclass(frozen=True)
class _Start:
    """A start of a run that this coordinator watches over."""

    run: SearchRun
    """As it was claimed."""
    config: PretrainConfig
    folder: RunFolder
    launch: Launch
    heartbeat: contextlib.AbstractContextManager[None]


class Coordinator:
    """Runs what waits, until the search is over.

    Args:
        config: the search.
        store: its runs.
        data_dir: of all runs.
        runs_dir: where their folders are; machines that share it can go on with each other's runs.
        places: of this machine.
        interruptions: what asks this process to leave.
        show: called every few seconds.
    """

    def __init__(
        self,
        config: SearchConfig,
        store: SearchStore,
        data_dir: Path,
        runs_dir: Path,
        places: Sequence[Place],
        interruptions: Interruptions,
        show: Callable[[], None],
    ) -> None:
        self._config, self._store, self._data_dir, self._runs_dir = config, store, data_dir, runs_dir
        self._places, self._interruptions, self._show = places, interruptions, show
        self._starts: dict[Place, _Start] = {}
        self._dropped: dict[int, str] = {}  # runs that have been asked to leave for good, and why
        self._leaving: str | None = None
        self._failures = 0
        self._next_look = 0.0

    def run(self) -> str | None:
        """Until no run waits, runs or is paused, here or on another machine.

        Returns:
            what has asked this process to leave, None where the search is over.

        Raises:
            UserError: runs can't be written, or fail one after the other; those that were running have saved.
        """
        self._wait_for_orphans()
        try:
            while self._goes_on():
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for start in self._starts.values():
                start.launch.ask_to_leave()
            raise
        if self._leaving and self._leaving != self._interruptions.pending():
            raise UserError(self._leaving)
        return self._leaving
