"""Progress of long work."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(name: str, total: int | None, unit: str, items: Iterable | None = None) -> tqdm:
    """Rate and time left; on a terminal at once, in a log file twice a minute."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(items, desc=name, total=total, unit=unit, unit_scale=True, mininterval=interval)
