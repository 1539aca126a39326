"""What has to be true of a run that was killed: of its newest checkpoint, of how it went on, of its end."""

import itertools
from dataclasses import dataclass
from typing import Any

from benchmarks.launches import LaunchedRun, step_seconds, wait_until
from common.errors import UserError
from pretrain.checkpoint import latest_checkpoint, read_record, read_state
from pretrain.run_record import read_metrics
from pretrain.weight_files import read_weights

_LEAVING_SECONDS = 10.0  # for the processes of a run that is over
_CLOCK_TOLERANCE = 0.05  # of figures that are rounded, and summed


@dataclass(frozen=True)
class Position:
    """Where a run stood at a moment."""

    step: int
    elapsed_seconds: float


START = Position(0, 0.0)


def position_of_newest(run: LaunchedRun) -> Position:
    """What a start would go on from: the checkpoint that `latest` points at."""
    folder = latest_checkpoint(run.folder)
    if folder is None:
        return START
    state = read_state(folder)
    return Position(state.step, state.elapsed_seconds)


def newest_checkpoint(run: LaunchedRun) -> Position:
    """The same, once it has been read whole.

    Raises:
        UserError: it is damaged or not whole.
    """
    if folder := latest_checkpoint(run.folder):
        read_record(folder)
        setting = read_state(folder).setting
        weights = read_weights(folder, setting.zero_stage, setting.world_size)
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise UserError(f"{folder} holds weights that are not finite")
    return position_of_newest(run)


def last_step(events: list[dict[str, Any]]) -> Position:
    """The last step that the record shows; what other lines tell lies behind it."""
    steps = [event for event in events if event["event"] in ("train", "start")]
    return Position(steps[-1]["step"], steps[-1]["elapsed_seconds"]) if steps else START


def longest_step(events: list[dict[str, Any]]) -> float:
    """Seconds; where no step follows on another one, of a start's first, with all that goes before it."""
    return max(step_seconds(events) or _first_step_seconds(events), default=0.0)


def allowance(events: list[dict[str, Any]]) -> float:
    """Seconds beyond the checkpoint interval that a kill may cost: a step, and a validation that was on the way.

    A start's first step comes with all that goes before it, which counts, too.
    """
    validations = [event["seconds"] for event in events if event["event"] == "validation"]
    return max(step_seconds(events) + _first_step_seconds(events), default=0.0) + max(validations, default=0.0)


def _first_step_seconds(events: list[dict[str, Any]]) -> list[float]:
    return [
        after["elapsed_seconds"] - before["elapsed_seconds"]
        for before, after in itertools.pairwise(events)
        if (before["event"], after["event"]) == ("start", "train")
    ]


def _last_start(events: list[dict[str, Any]]) -> float:
    """Seconds of a start, where the last one had too little left for itself and a step, and only closed the run."""
    last = max(number for number, event in enumerate(events) if event["event"] == "start")
    closed_only = not any(event["event"] == "train" for event in events[last:])
    return max(_first_step_seconds(events), default=0.0) if closed_only else 0.0


def check_end(run: LaunchedRun, budget_seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Figures of a run that should be complete, and what is wrong with it."""
    summary, raw, events = run.summary(), run.events(), read_metrics(run.folder)
    if not run.is_complete:
        return {}, [f"the run is not complete: {run.last_words()}"]
    error, longest = summary["elapsed_seconds"] - budget_seconds, longest_step(raw)
    spent = sum(summary["spent_seconds"].values())
    train = [event for event in events if event["event"] == "train"]
    newest = newest_checkpoint(run)
    wrong = {
        f"the budget is passed by {error:.3f} s, a step takes {longest:.3f} s": error > longest,
        f"{-error:.3f} s of the budget are unused, a step takes {longest:.3f} s": -error > longest + _last_start(raw),
        f"the parts of the time spent sum up to {spent:.3f} s": abs(spent - summary["elapsed_seconds"])
        > _CLOCK_TOLERANCE,
        "a step is missing or there twice": [event["step"] for event in train] != list(range(1, summary["steps"] + 1)),
        "time runs backwards": any(
            later["elapsed_seconds"] < sooner["elapsed_seconds"] for sooner, later in itertools.pairwise(train)
        ),
        f"the newest checkpoint is of step {newest.step}": newest.step != summary["steps"],
        "there is no model": not (run.folder / "hf" / "model.safetensors").is_file(),
        f"left behind: {', '.join(_leftovers(run))}": bool(_leftovers(run)),
        "processes are left": not wait_until(lambda: not run.processes(), _LEAVING_SECONDS),
    }
    figures = {
        "starts": sum(event["event"] == "start" for event in raw),
        "steps": summary["steps"],
        "error_seconds": round(error, 3),
        "longest_step_seconds": round(longest, 3),
        "lost_seconds": summary["lost_seconds"],
    }
    return figures, [what for what, is_so in wrong.items() if is_so]


def _leftovers(run: LaunchedRun) -> list[str]:
    """Files and folders that were only half-written."""
    aside = [*run.folder.rglob(".*.tmp"), *run.folder.rglob(".*.old"), *run.folder.glob("checkpoints/writing")]
    return [str(path.relative_to(run.folder)) for path in aside]
