"""Weights & Biases beside ``metrics.jsonl``, for a run that wants it: it asks nothing and never stops the run."""

import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from common.errors import UserError
from common.folders import CONFIG_FILE, write_text

_PROJECT: Final = "budget-bert"  # WANDB_PROJECT says otherwise
_ID_FILE: Final = "wandb_id"
_OLDEST: Final = (0, 31)  # the first that was tried; older ones can't be told to ask nothing
_MODES_WITHOUT_KEY: Final = ("offline", "dryrun", "disabled")
_START_SECONDS: Final = 30  # of the budget, at most, if the network is broken
_END_SECONDS: Final = 10  # launchers kill soon after they have told a run to leave


def check_wandb() -> None:
    """Refuse to start without what W&B needs; only rank 0 reports there, so only rank 0 checks.

    Raises:
        UserError: the package or the key is missing, or a setting is wrong.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package that is not there: pip install wandb") from None
    if tuple(map(int, wandb.__version__.split(".")[:2])) < _OLDEST:
        raise UserError(f"--wandb needs wandb {'.'.join(map(str, _OLDEST))} or later: pip install --upgrade wandb")
    try:
        mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
        is_ready = mode in _MODES_WITHOUT_KEY or wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"--wandb: {_one_line(error)}") from None
    if not is_ready:
        raise UserError("--wandb finds no API key: run `wandb login` once or set WANDB_API_KEY; or WANDB_MODE=offline")


class WandbTracker:
    """Sends a run's events to W&B; :func:`check_wandb` has been passed. Where W&B fails, the run goes on without.

    Args:
        folder: the run's; it keeps the id under which a resumed run goes on, and W&B's own files in ``wandb/``.
        say: prints a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._run: Any = None
        self._attempt(self._start)

    def log(self, event: str, step: int, elapsed_seconds: float, values: Mapping[str, float]) -> None:
        """Send the numbers of an event under ``event/name``."""
        if self._run:
            named = {f"{event}/{name}": value for name, value in values.items()}
            self._attempt(lambda: self._run.log({"step": step, "elapsed_seconds": elapsed_seconds, **named}))

    def close(self) -> None:
        """Wait a little for what is on its way; ``wandb sync`` sends what was not."""
        if self._run:
            self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, it must not end the run
            self._run = None
            self._say(f"no more W&B ({_one_line(error)}): {self._folder / 'metrics.jsonl'} has everything")

    def _start(self) -> None:
        import wandb

        options = {
            "dir": str(self._folder),
            "id": _run_id(self._folder),
            "name": self._folder.resolve().name,
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "config": yaml.safe_load((self._folder / CONFIG_FILE).read_text(encoding="utf-8")),
            "resume": "allow",
            "settings": wandb.Settings(
                silent=True, console="off", init_timeout=_START_SECONDS, finish_timeout=_END_SECONDS
            ),
        }
        try:
            self._run = wandb.init(**options)
        except wandb.Error as error:
            self._say(f"W&B can't be reached ({_one_line(error)}): kept in {self._folder / 'wandb'} for `wandb sync`")
            wandb.teardown()  # frees the id
            self._run = wandb.init(**options, mode="offline")
        # Not W&B's own count of steps: that one refuses to go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")


def _run_id(folder: Path) -> str:
    """The folder's name and some chance, made at the first start."""
    file = folder / _ID_FILE
    if not file.exists():
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name)[:40]
        write_text(file, f"{name}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
