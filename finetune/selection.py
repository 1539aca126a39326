"""Which configuration of a grid is best: the one with the highest median over its seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetune.trial import Cell

Configuration = tuple[float, int, int]
"""Learning rate, batch size, epochs."""


class Group(NamedTuple):
    """What a task's cells are compared by, and never searched for the best."""

    initialization: str
    variant: str

    @classmethod
    def of(cls, cell: Cell) -> "Group":
        """The one that ``cell`` is in."""
        return cls(cell.initialization, cell.variant)


def by_group(cells: Sequence[Cell]) -> dict[Group, list[Cell]]:
    """One task's cells by group, in the grid's order."""
    groups: dict[Group, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[Group.of(cell)].append(cell)
    return dict(groups)


def by_configuration(cells: Sequence[Cell]) -> dict[Configuration, list[Cell]]:
    """The cells of each configuration, one per seed, in the grid's order; the cells are of one group."""
    groups: dict[Configuration, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.configuration].append(cell)
    return dict(groups)


def best_cells(cells: Sequence[Cell], scores: Mapping[Cell, float]) -> list[Cell]:
    """The cells of the configuration with the highest median; of equal medians the first in the grid's order.

    Args:
        cells: one task's and one group's.
        scores: of all of them.
    """
    groups = by_configuration(cells).values()
    return max(groups, key=lambda group: statistics.median(scores[cell] for cell in group))


def median_cell(cells: Sequence[Cell], scores: Mapping[Cell, float]) -> Cell:
    """Of one configuration's cells the one with the median score (the lower one of two); of equals the lowest seed."""
    median = statistics.median_low(scores[cell] for cell in cells)
    return min((cell for cell in cells if scores[cell] == median), key=lambda cell: cell.seed)


def may_be_best(cells: Sequence[Cell], scores: Mapping[Cell, float]) -> set[Configuration]:
    """The configurations that the best one may still turn out to be, whatever the cells without a score bring."""
    groups = by_configuration(cells)
    complete = [group for group in groups.values() if all(cell in scores for cell in group)]
    if not complete:
        return set(groups)
    best = best_cells([cell for group in complete for cell in group], scores)
    to_beat = statistics.median(scores[cell] for cell in best)
    candidates = {best[0].configuration}
    for configuration, group in groups.items():
        if group in complete:
            continue
        hoped_for = statistics.median(scores.get(cell, math.inf) for cell in group)
        is_earlier = cells.index(group[0]) < cells.index(best[0])
        if hoped_for > to_beat or (hoped_for == to_beat and is_earlier):
            candidates.add(configuration)
    return candidates
