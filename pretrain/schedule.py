"""The learning rate's course over the budget."""


def lr_multiplier(position: float, warmup_proportion: float) -> float:
    """Share of the peak learning rate at ``position`` of the schedule: linear warmup, then linear decay to zero.

    Args:
        position: share of the schedule that is spent, 0 at its start and 1 at its end (zero from there on).
        warmup_proportion: share of the schedule that warms up (Izsak et al. 2021, 4.1), from 0 to below 1.
    """
    if position < warmup_proportion:
        return position / warmup_proportion
    return max(0.0, (1.0 - position) / (1.0 - warmup_proportion))
