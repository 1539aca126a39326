"""Plans against runs: what `python -m pretrain plan` foretells of small real runs, and what these then come to.

    python benchmarks/plan.py [--data DIR] [--seconds 75] [--trial_seconds 20] [--processes 2] [--record]

Each run is planned by one trial and then made, with the plan's micro-batch, by the same kind of launcher. DIR holds
wikitext/enwiki-2014-train.txt.gz and bert-base-uncased/vocab.txt; without them the demo's generated text stands in, and
the figures say so. Give it an idle machine: both sides are timed.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

from benchmarks.shared import record, table, text_to_build
from data_prep.build import build
from pretrain.architecture import ModelConfig
from pretrain.config import PretrainConfig
from pretrain.forecast import Forecast
from pretrain.plan import Request, make_plan
from pretrain.run_record import read_metrics
from pretrain.trial_run import folder_bytes, run_to_its_end

WITHIN = 0.10


@dataclass(frozen=True)
class Planned:
    """A run to plan and make."""

    preset: str
    train_batch_size: int
    interval: str
    """Between validations and between checkpoints."""


RUNS = {
    "tiny": Planned("bert-tiny", 128, "20%"),
    "often": Planned("bert-tiny", 32, "10%"),
    "mini": Planned("bert-mini", 32, "25%"),
}


def main() -> None:
    """Plan and run everything, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with wikitext/ and bert-base-uncased/")
    parser.add_argument("--seconds", type=float, default=75.0, help="budget of each run")
    parser.add_argument("--trial_seconds", type=float, default=20.0, help="budget of each trial")
    parser.add_argument("--processes", type=int, default=2, help="of trials and runs")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="which of them")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    arguments = parser.parse_args()
    targets, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        config, _, text = text_to_build(arguments.data, Path(folder))
        build(replace(config, dupe_factor=2), Path(folder) / "data")
        figures |= {
            "text": text,
            **{name: getattr(arguments, name) for name in ("seconds", "trial_seconds", "processes")},
        }
        for name in arguments.runs:
            told = plan_and_run(name, arguments, Path(folder))
            figures |= told
            targets |= {key: ("at most", WITHIN) for key in told if key.endswith("_error")}
    print(table(figures, targets))
    if arguments.record:
        record(figures, "cpu", "plan")
    print(json.dumps(figures))


def plan_and_run(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What was foretold, what came, and the error of one to the other, by figure."""
    planned = RUNS[name]
    print(f"{name}: a plan, then a run of {arguments.seconds:g} s ...", file=sys.stderr, flush=True)
    config = PretrainConfig(
        model=ModelConfig(preset=planned.preset),
        time_budget=f"{arguments.seconds}s",
        train_batch_size=planned.train_batch_size,
        validation_interval=planned.interval,
        early_validation_interval=None,
        checkpoint_interval=planned.interval,
    )
    request = Request(
        presets=[planned.preset],
        train_batch_sizes=[planned.train_batch_size],
        num_gpus=arguments.processes,
        trial_seconds=arguments.trial_seconds,
        folder=folder,
    )
    forecast = make_plan(config, folder / "data", request).rows[0].forecasts[0]
    observed = observe(replace(config, micro_batch_size=forecast.micro_batch_size), arguments.processes, folder, name)
    figures = {}
    for figure, predicted in foretold(forecast).items():
        came = observed[figure]
        figures |= {
            f"{name}_{figure}_predicted": round(predicted, 3),
            f"{name}_{figure}_observed": round(came, 3),
            f"{name}_{figure}_error": round(abs(predicted - came) / (came or 1), 4),
        }
    return figures


def foretold(forecast: Forecast) -> dict[str, float]:
    """Of the plan, what a run can be held against."""
    return {
        "steps": forecast.course.steps,
        "sequences": forecast.sequences,
        "epochs": forecast.epochs,
        "tokens": forecast.tokens,
        "validations": forecast.course.validations,
        "closing_seconds": forecast.durations.closing,
        "wall_seconds": forecast.wall_seconds,
        "disk_megabytes": forecast.disk_bytes / 1e6,
        "memory_gigabytes": forecast.memory_bytes / 1e9,
    }


def observe(config: PretrainConfig, processes: int, folder: Path, name: str) -> dict[str, float]:
    """The same figures of a run."""
    run = folder / "runs" / name
    timeout = 600 + 2 * config.budget_seconds
    wall_seconds = run_to_its_end(config, folder / "data", run, processes, timeout)
    summary, events = json.loads((run / "summary.json").read_text()), read_metrics(run)
    tokens = step = 0
    for event in (event for event in events if event["event"] == "train"):
        sequences = (event["step"] - step) * config.train_batch_size
        tokens += sequences * event["tokens_per_second"] / event["sequences_per_second"]
        step = event["step"]
    return {
        **{name: summary[name] for name in ("steps", "sequences", "epochs", "closing_seconds")},
        "tokens": tokens,
        "validations": sum(event["event"] == "validation" for event in events) - 1,  # without the closing one
        "wall_seconds": wall_seconds,
        "disk_megabytes": folder_bytes(run) / 1e6,
        "memory_gigabytes": max(event["memory_gigabytes"] for event in events if event["event"] == "train"),
    }


if __name__ == "__main__":
    main()
