"""What a search knows of each of its runs, and which folder is a search's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from common.folders import CONFIG_FILE

State = Literal["waiting", "running", "paused", "dropped", "diverged", "failed", "finished"]

UNFINISHED: Final[tuple[State, ...]] = ("waiting", "running", "paused")


@dataclass(frozen=True)
class SearchRun:
    """One configuration and how far it has come. What a pause or a kill has interrupted goes on in the same run."""

    number: int
    """From 0, in the order in which configurations were chosen."""
    parameters: Mapping[str, Any]
    """By the dotted name of a field of ``PretrainConfig``."""
    state: State
    """waiting: for a place, with a start or a promotion behind it or not; paused: at a rung, undecided."""
    stretch: int = 0
    """How many pauses lie behind it."""
    because: str | None = None
    """Why it was dropped, diverged or failed."""
    place: str | None = None
    """Where it runs, like "node3, GPUs 0-7" or "node3, cores 0"; None unless running."""
    started: float | None = None
    """When its present start began, in seconds since the epoch; None unless running."""
    starts: int = 0
    """Launches so far."""
    kills: int = 0
    """How often it was killed in a row, without coming any further."""
    errors: int = 0
    """How often it ended with an error of its own in a row, without coming any further."""
    elapsed_seconds: float = 0.0
    """Of its budget, as last known."""
    closing_seconds: float = 0.0
    """After the budget's end: the last checkpoint, validation and export."""
    lost_seconds: float = 0.0
    """Of work that kills have destroyed."""
    launch_seconds: float = 0.0
    """Wall-clock of all its ended starts, from command to exit."""
    steps: int = 0
    """Optimizer steps so far."""
    sequences: int = 0
    """Training sequences so far."""
    curve: tuple[tuple[float, float], ...] = ()
    """(position, validation loss in nats), rising in the position: seconds or steps, as the budget counts."""
    rung_losses: Mapping[str, float] = field(default_factory=dict)
    """The validation loss at each rung with a pause that it has reached, by the rung's ``at``."""
    final_loss: float | None = None
    """Of a finished run: over the whole held-out set, with the weights that are exported."""
    trial: int = 0
    """The number of its Optuna trial."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number:03d}"


def is_search(folder: Path) -> bool:
    """Whether it is the folder of a search."""
    file = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(config, dict) and {"space", "sampler"} <= config.keys()
