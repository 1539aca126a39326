"""The learning rate's course over the budget: warmup, then one of several ways down."""

import math
from typing import Literal, get_args

Schedule = Literal["linear", "cosine", "wsd", "exponential"]
SCHEDULES = get_args(Schedule)
_COOLDOWN = 0.2
_LAST_EXPONENTIAL = 0.01


def lr_multiplier(position: float, warmup_proportion: float, schedule: Schedule = "linear") -> float:
    """Share of the peak learning rate at ``position`` of the schedule.

    * ``linear``: linear warmup, linear decay to zero (Izsak et al. 2021, Table 4).
    * ``cosine``: linear warmup, then half a cosine to zero (Loshchilov & Hutter 2017, 3).
    * ``wsd``: linear warmup, constant, and over the last fifth of the schedule one minus a square root to zero
      (Hägele et al. 2024, 3).
    * ``exponential``: the other curve of 24hBERT's code: quadratic warmup, then a constant factor a step; here it ends
      at a hundredth of the peak, whatever the number of steps.

    Args:
        position: share of the schedule that is spent, 0 at its start and 1 at its end; beyond it, the value at its end.
        warmup_proportion: share of the schedule that warms up (Izsak et al. 2021, 4.1), from 0 to below 1.
        schedule: the course.
    """
    position = min(1.0, position)
    if position < warmup_proportion:
        risen = position / warmup_proportion
        return risen**2 if schedule == "exponential" else risen
    decayed = (position - warmup_proportion) / (1.0 - warmup_proportion)
    match schedule:
        case "linear":
            return 1.0 - decayed
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * decayed))
        case "wsd":
            cooldown = min(_COOLDOWN, 1.0 - warmup_proportion)
            return 1.0 - math.sqrt(max(0.0, 1.0 - (1.0 - position) / cooldown))
        case "exponential":
            return _LAST_EXPONENTIAL**decayed
