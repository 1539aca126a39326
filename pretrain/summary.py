"""``summary.json``: how a run has ended, and whether it is complete."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.folders import read_json, write_json
from pretrain.checkpoint import latest_checkpoint, read_state
from pretrain.run_record import COMPLETE, PAUSE, STATUS_FILE, SUMMARY_FILE

DS_CONFIG_FILE = "ds_config.json"
MODEL_FOLDER = "hf"
DIVERGED = "diverged"
GOES_ON = 75
"""Exit code of a run that has stopped before its end (``EX_TEMPFAIL`` of sysexits.h): the same command goes on."""
_ENDS = {
    **dict.fromkeys(COMPLETE, "complete"),
    DIVERGED: "its last good checkpoint is kept",
    PAUSE: "the same command with a later --pause_at, or with null, goes on",
}
_NOT_OURS = "this is not a summary of ours"


def write_summary(folder: Path, summary: dict[str, Any], spent_seconds: dict[str, float]) -> None:
    """Tell how the run has ended; it comes last. What an end that goes on has not got is null."""
    unknown = {"validation_loss": None, "validation_accuracy": None, "closing_seconds": None}
    spent = {activity: round(seconds, 3) for activity, seconds in spent_seconds.items()}
    write_json(folder / SUMMARY_FILE, {**unknown, **summary, "spent_seconds": spent})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """None where the run is still going, or was killed.

    Raises:
        UserError: it is damaged.
    """
    file = folder / SUMMARY_FILE
    if not file.exists():
        return None
    summary = read_json(file, _NOT_OURS)
    if not isinstance(summary, dict) or "stopped_by" not in summary:
        raise UserError(f"{file}: {_NOT_OURS}")
    return summary


def is_complete(folder: Path) -> bool:
    """Whether the run in ``folder`` has nothing left to do."""
    summary = read_summary(folder)
    return summary is not None and summary["stopped_by"] in COMPLETE


def exit_code(stopped_by: str) -> int:
    """What a process tells its caller: 0 for a complete run, 2 for one that has diverged, else :data:`GOES_ON`."""
    if stopped_by == DIVERGED:
        return UserError.exit_code
    return 0 if stopped_by in COMPLETE else GOES_ON


def describe(folder: Path) -> tuple[str, int]:
    """A line on the run in ``folder``, and its exit code.

    Raises:
        UserError: there is no run.
    """
    if not (folder / DS_CONFIG_FILE).exists():
        raise UserError(f"{folder} is no run's folder (it has no {DS_CONFIG_FILE})")
    if summary := read_summary(folder):
        stopped_by = summary["stopped_by"]
        return (
            f"{folder}: stopped by {stopped_by} after step {summary['steps']}, {summary['elapsed_seconds']:.1f} s "
            f"spent: {_ENDS.get(stopped_by, 'the same command goes on')}"
        ), exit_code(stopped_by)
    status = read_json(folder / STATUS_FILE, _NOT_OURS) if (folder / STATUS_FILE).exists() else None
    newest = latest_checkpoint(folder)
    kept = f"step {read_state(newest).step} is saved" if newest else "nothing is saved yet"
    last = f"last seen in {status['phase']} (process {status['pid']} on {status['host']})" if status else "not started"
    return f"{folder}: still going or killed, {last}, {kept}", GOES_ON
