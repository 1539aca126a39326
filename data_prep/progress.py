"""Progress of long work."""

import sys

from tqdm import tqdm


def progress_bar(name: str, total: int | None, unit: str) -> tqdm:
    """Rate and time left; on a terminal at once, in a log file twice a minute. Close it, whatever happens."""
    return tqdm(desc=name, total=total, unit=unit, unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 30)
