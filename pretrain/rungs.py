"""Rungs: the times at which a search drops the runs that do not do well (Izsak et al. 2021, 4.2)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pretrain.budget import share_of_run

_KEEP = re.compile(r"below (?P<bound>\d+(?:\.\d+)?)|top ?(?P<percent>\d+(?:\.\d+)?) ?%", re.IGNORECASE)

Verdict = Literal["goes on", "dropped"]


@dataclass(frozen=True)
class Rung:
    """A time of every run's own clock, and which runs go on from there."""

    at: str
    """time or share of the run, like 3h or 12.5%"""
    keep: str
    """below 6.0: runs whose validation loss has come down to this, each judged alone; top 50 %: the best half, rounded
    up, of the runs that get there, which pause until it is certain who they are"""

    def __post_init__(self) -> None:
        try:
            share_of_run(self.at, 1.0)
        except ValueError as error:
            raise ValueError(f"rung: at: {error}") from None
        if not self._keep or (self.bound is not None and not self.bound > 0):
            raise ValueError(f"rung at {self.at}: keep '{self.keep}' is neither like 'below 6.0' nor like 'top 50 %'")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"rung at {self.at}: keep '{self.keep}' must name a share between 0 % and 100 %")

    @property
    def _keep(self) -> re.Match[str] | None:
        return _KEEP.fullmatch(" ".join(self.keep.split()))

    @property
    def bound(self) -> float | None:
        """The largest validation loss, in nats, with which a run goes on; None of a rung that keeps a share."""
        text = self._keep["bound"]
        return None if text is None else float(text)

    @property
    def share(self) -> float | None:
        """The share that goes on, in (0, 1); None of a rung that keeps what is below a bound."""
        text = self._keep["percent"]
        return None if text is None else float(Fraction(text) / 100)

    def mark(self, budget_seconds: float | None) -> float:
        """Where it lies, as a share of the run.

        Args:
            budget_seconds: length of the run, None for one of ``max_steps``.

        Raises:
            ValueError: the rung is at a time, and the run has no length in time.
        """
        return share_of_run(self.at, budget_seconds)


def verdict(losses: Sequence[tuple[float, int]], own: tuple[float, int], num_open: int, share: float) -> Verdict | None:
    """Whether a run is among the best share at a rung, as soon as that is the same whatever the others will do.

    Args:
        losses: (validation loss, run number) of all runs that have reached the rung, ``own`` included. Among equal
            losses the lower number is the better one.
        own: the run in question.
        num_open: how many runs may still reach the rung, with any loss, or never.
        share: of the runs that reach the rung in the end, this share goes on, rounded up to whole runs.

    Returns:
        None while it is open.
    """
    rank = 1 + sum(other < own for other in losses)
    most_kept = _num_kept(len(losses) + num_open, share)
    if rank + num_open <= most_kept:  # even where all open ones come and are better; fewer that come leave more room
        return "goes on"
    return "dropped" if rank > most_kept else None


def _num_kept(num_runs: int, share: float) -> int:
    """The share, rounded up, of the decimal number that is written: 0.07 of 100 is 7, though 0.07 * 100 is above it."""
    return math.ceil(Fraction(repr(share)) * num_runs)
