"""How exactly runs end with their budget, and how near to zero the learning rate is then.

    python benchmarks/deadline.py [--runs 20] [--seconds 60] [--record]

Each run is the demo's model on two processes under the `deepspeed` launcher, started as a user starts it. The error is
`elapsed_seconds` minus the budget: below zero, time was left unused; above, it was overrun. Steps are counted in the
run's own median step; a slow step is the slowest of its last ten. That the run's clock is right is seen from outside:
the system's time between the first line of metrics.jsonl and the moment when status.json tells of the closing. Give it
an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import yaml

from benchmarks.launches import REPOSITORY, LaunchedRun, launched_run, step_seconds, wait_until
from benchmarks.shared import Targets, markdown, misses, record, table

CONFIG = REPOSITORY / "configs" / "pretrain" / "demo.yaml"
START_SECONDS = 180.0
COLUMNS = {
    "error_seconds": "error, s",
    "error_steps": "error, steps",
    "step_seconds": "median step, s",
    "longest_step_seconds": "longest step, s",
    "steps": "steps",
    "last_learning_rate": "last LR / peak",
    "last_learning_rate_steps": "the same, in steps",
    "last_learning_rate_slow_steps": "in slow steps",
    "outside_difference_seconds": "clock, outside, s",
    "closing_seconds": "closing, s",
    "start_and_exit_seconds": "start and exit, s",
    "wall_seconds": "launch to exit, s",
}
TARGETS: Targets = {
    "overrun_steps_max": ("at most", 1),
    "unused_steps_median": ("at most", 1),
    "last_learning_rate_steps_median": ("at most", 1),
    "last_learning_rate_slow_steps_max": ("at most", 1),
    "outside_difference_seconds_max": ("at most", 0.2),
}


def main() -> None:
    """Run, print tables, and one line of JSON; exit code 1 where a figure is not where it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many")
    parser.add_argument("--seconds", type=int, default=60, help="time budget of each")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.runs, arguments.seconds, Path(folder))
    rows = [[str(number), *(f"{row[name]}" for name in COLUMNS)] for number, row in enumerate(figures["rows"], 1)]
    print(markdown([["run", *COLUMNS.values()], *rows]), "\n")
    print(table({name: value for name, value in figures.items() if name != "rows"}, TARGETS))
    if arguments.record:
        record(figures, "cpu", "deadline")
    print(json.dumps(figures))
    if wrong := misses(figures, TARGETS):
        sys.exit(f"missed: {', '.join(wrong)}")


def measure(runs: int, seconds: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    data = folder / "data"
    build = [sys.executable, "-m", "data_prep", "build", "--config", "configs/data/demo.yaml", "--output_dir", data]
    subprocess.run(build, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    rows = []
    for number in range(1, runs + 1):
        overrides = ["--time_budget", f"{seconds}s", "--log_interval", "1"]
        rows.append(figures_of_run(launched_run(folder / f"run-{number}", CONFIG, data, *overrides), seconds))
        print(f"run {number} of {runs}: {rows[-1]['error_seconds']} s", file=sys.stderr)
    errors = [row["error_seconds"] for row in rows]
    return {
        "runs": runs,
        "time_budget_seconds": seconds,
        "error_seconds_median": round(statistics.median(errors), 4),
        "error_seconds_max": max(errors, key=abs),
        **spread("overrun_seconds", [max(0.0, error) for error in errors]),
        **spread("unused_seconds", [max(0.0, -error) for error in errors]),
        **spread("overrun_steps", [max(0.0, row["error_steps"]) for row in rows]),
        **spread("unused_steps", [max(0.0, -row["error_steps"]) for row in rows]),
        **{
            figure: value
            for name in COLUMNS
            if not name.startswith("error")
            for figure, value in spread(name, [row[name] for row in rows]).items()
        },
        "rows": rows,
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median and maximum under names of their own."""
    return {f"{name}_median": round(statistics.median(values), 5), f"{name}_max": max(values)}


def figures_of_run(run: LaunchedRun, budget_seconds: float) -> dict[str, Any]:
    """One run from launch to exit."""
    launched = time.monotonic()
    launcher = run.start()
    has_ended = lambda: launcher.poll() is not None  # noqa: E731
    wait_until(lambda: bool(run.events()) or has_ended(), START_SECONDS)
    if has_ended():
        sys.exit(f"the run did not start: {run.last_words()}")
    started, elapsed_then = run.clock_reading()
    wait_until(lambda: run.status().get("phase") in ("closing", "done") or has_ended(), budget_seconds + START_SECONDS)
    ended = time.time()
    if launcher.wait(START_SECONDS) or not run.is_complete:
        sys.exit(f"the run did not come to its end: {run.last_words()}")
    wall = time.monotonic() - launched
    return judge(run, budget_seconds) | {
        "outside_difference_seconds": round(
            abs(ended - started - (run.summary()["elapsed_seconds"] - elapsed_then)), 3
        ),
        "start_and_exit_seconds": round(wall - run.summary()["elapsed_seconds"] - run.summary()["closing_seconds"], 2),
        "wall_seconds": round(wall, 2),
    }


def judge(run: LaunchedRun, budget_seconds: float) -> dict[str, Any]:
    """What the run's own record tells."""
    summary, events = run.summary(), run.events()
    config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    steps = step_seconds(events)
    step = statistics.median(steps)
    last = [event for event in events if event["event"] == "train"][-1]
    error = summary["elapsed_seconds"] - budget_seconds
    # The share of the peak that the linear decay takes off in a second.
    slope = 1 / budget_seconds / (1 - config["warmup_proportion"])
    learning_rate = last["learning_rate"] / config["optimizer"]["learning_rate"]
    return {
        "error_seconds": round(error, 4),
        "error_steps": round(error / step, 3),
        "step_seconds": round(step, 4),
        "longest_step_seconds": round(max(steps), 4),
        "steps": summary["steps"],
        "last_learning_rate": round(learning_rate, 6),
        "last_learning_rate_steps": round(learning_rate / (slope * step), 3),
        "last_learning_rate_slow_steps": round(learning_rate / (slope * max(steps[-10:])), 3),
        "closing_seconds": summary["closing_seconds"],
    }


if __name__ == "__main__":
    main()
