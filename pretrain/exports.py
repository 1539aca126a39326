"""Models on the way: a Hugging Face folder at each mark of ``export_at``."""

from pathlib import Path

from pretrain.checkpoint import latest_checkpoint
from pretrain.export import export

EXPORTS_FOLDER = "exports"
_LATE = 0.02  # of the budget


class Exports:
    """Those of one run.

    Args:
        output_dir: the run's folder.
        marks: shares of the budget, in (0, 1).
    """

    def __init__(self, output_dir: Path, marks: list[float]) -> None:
        self._output_dir = output_dir
        self._marks = dict(enumerate(marks, 1))

    def folder(self, number: int) -> Path:
        """Of mark ``number``, counted from 1; ready to be pushed as a revision of a model repository."""
        return self._output_dir / EXPORTS_FOLDER / f"{100 * self._marks[number]:.4g}-percent"

    def missing(self) -> dict[int, float]:
        """The marks that have no folder, by number."""
        return {number: mark for number, mark in self._marks.items() if not self.folder(number).exists()}

    def to_come(self, progress: float) -> dict[int, float]:
        """Those among them that a start at ``progress`` makes: the coming ones, and one that a kill has cut short.

        What lies further back would bear a wrong name.
        """
        return {number: mark for number, mark in self.missing().items() if mark > progress - _LATE}

    def write(self, number: int) -> None:
        """Export the newest checkpoint; rank 0 alone calls it."""
        export(latest_checkpoint(self._output_dir), self.folder(number))

    def facts(self, number: int) -> dict[str, float | str]:
        """For the run's record."""
        return {"mark": self._marks[number], "folder": str(self.folder(number).relative_to(self._output_dir))}
