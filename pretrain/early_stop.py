"""Rules by which a run that does not do well gives up the rest of its budget."""

from dataclasses import dataclass
from typing import Literal

from common.errors import UserError
from pretrain.budget import share_of_run


@dataclass(frozen=True)
class StopRule:
    """Stop a run that has not reached a bound in time."""

    after: str
    """time or share of the run, like 3h or 12.5%: the first figure from then on is judged"""
    metric: Literal["validation_loss", "train_loss"]
    """in nats; the best so far counts"""
    bound: float
    """the run goes on where it has come down to this"""

    def __post_init__(self) -> None:
        share_of_run(self.after, 1.0)
        if not self.bound > 0:
            raise ValueError(f"early_stop: bound {self.bound} must be above 0")


_HAIR = 1e-9  # of the run: floating point, as in Cadence
TWENTY_FOUR_HOUR_BERT = (StopRule("3h", "validation_loss", 6.0),)
"""Izsak et al. 2021, 4.2: what has not reached a validation loss of 6.0 after 3 hours is dropped."""


class Diverged(UserError):
    """The loss, the weights or the loss scale are beyond use: nothing but an earlier checkpoint helps."""


class EarlyStop:
    """Watches the rules of a run.

    Args:
        rules: in any order.
        run_seconds: the run's length, None for one of ``max_steps``.
        best: the best figure of each metric so far.
    """

    def __init__(self, rules: tuple[StopRule, ...], run_seconds: float | None, best: dict[str, float]) -> None:
        self._rules = [(rule, share_of_run(rule.after, run_seconds)) for rule in rules]
        self._best = dict(best)

    @property
    def best(self) -> dict[str, float]:
        """The best figure of each metric so far."""
        return dict(self._best)

    def check(self, metric: str, value: float, progress: float) -> str | None:
        """Take a new figure; the sentence that ends the run where it breaks a rule.

        A rule is judged once: by the first figure at or behind its mark.
        """
        best = self._best[metric] = min(value, self._best.get(metric, value))
        due = [(rule, mark) for rule, mark in self._rules if rule.metric == metric and progress >= mark - _HAIR]
        self._rules = [entry for entry in self._rules if entry not in due]
        for rule, _ in due:
            if best > rule.bound:
                return f"{metric} has come down to {best:.3f} after {rule.after}, not to {rule.bound:g}"
        return None
