"""A fine-tuning trial on a CPU against Hugging Face's Trainer, side by side: speeds in turns, and scores over seeds.

    python benchmarks/glue_trial.py [--data DIR] [--model DIR] [--only speed|scores] [--trials FILE] [--record]

Three sides train the same model from the same weights, in the same batches of 32, with the same optimizer, schedule and
precision: this project's trial; "padded", the Trainer as the `run_glue` script sets it up, every row padded to 128; and
"dynamic", the Trainer with batches padded to their longest row. Both Trainers take rows from memory in random order,
and log, save and evaluate nothing while they are timed. Speeds are of whole epochs over rows drawn from CoLA's and
RTE's training sets, the same ones for all sides; ratios are medians over the rounds. Scores are of whole trainings,
ours and the dynamic Trainer's (padding does not change what is computed), on the whole development set. They count as
equal where the means differ by no more than two standard errors; over 5 seeds equal sides fail that 8 times in 100.

DIR of --data holds glue/, and bert-base-uncased/vocab.txt for the untrained model that stands in for --model; that one
has speeds but no scores. --trials keeps each finished trial of the scores, and takes from there what it has already.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import numpy as np
import torch

from benchmarks.glue_sides import (
    FineTuning,
    HuggingFace,
    Ours,
    Outcome,
    Rows,
    load_rows,
    make_random_model,
    some_rows,
    standard_errors_apart,
)
from benchmarks.gpu_timing import say
from benchmarks.shared import Targets, record, table
from common.folders import read_json, write_json
from finetune.model import Encoder, model_fingerprint

EPOCHS = {"cola": 3, "rte": 3}
LEARNING_RATE = 1e-4  # small models want more than the paper's
BATCH_SIZE = 32
WARMING_ROWS = 64
SPEED_TARGETS: Targets = {
    "vs_padded_cola": ("at least", 4),
    "vs_padded_rte": ("at least", 1.5),
    "vs_dynamic_cola": ("at least", 1.15),
    "vs_dynamic_rte": ("at least", 1.15),
}
STANDARD_ERRORS_APART = ("at most", 2)
CPU = torch.device("cpu")


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    arguments = parse_arguments()
    if not importlib.util.find_spec("accelerate"):
        sys.exit("Hugging Face's Trainer needs the package accelerate: pip install accelerate")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_random_model(
            Path(folder) / "model", arguments.data / "bert-base-uncased" / "vocab.txt"
        )
        figures, targets = measure(arguments, model)
    print(table({name: value for name, value in figures.items() if not isinstance(value, list)}, targets))
    if arguments.record:
        record(figures, "cpu", "glue_trial")
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with glue/ and bert-base-uncased/")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: an untrained BERT of MiniLM's size")
    parser.add_argument("--only", choices=("speed", "scores"), help="one part; default: both")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every side")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the speeds")
    parser.add_argument("--rows", type=int, default=1024, help="rows of an epoch whose speed is taken")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the speeds")
    parser.add_argument("--seeds", type=int, default=5, help="trainings a task and side, for the scores")
    parser.add_argument("--epochs", type=int, help="of the scores' trainings; default: 3")
    parser.add_argument("--score-tasks", nargs="+", choices=EPOCHS, default=[*EPOCHS], help="default: both")
    parser.add_argument("--score-precision", choices=("fp32", "bf16"), default="bf16", help="of the scores' trainings")
    parser.add_argument("--trials", type=Path, help="JSON file that keeps the finished trials of the scores")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    arguments = parser.parse_args()
    if arguments.only == "scores" and not arguments.model:
        parser.error("an untrained model has no scores to compare: give --model")
    if arguments.seeds < 2:
        parser.error("--seeds takes 2 or more: one has no spread")
    return arguments


def measure(arguments: argparse.Namespace, model: Path) -> tuple[dict[str, Any], Targets]:
    """All figures, and what they should be."""
    encoder, targets = Encoder(model), {}
    data = {task_name: load_rows(task_name, arguments.data / "glue", model) for task_name in EPOCHS}
    figures: dict[str, Any] = {
        "model": f"{arguments.model.name} ({fingerprint(model)})" if arguments.model else "untrained, 6 layers of 384",
        "threads": arguments.threads,
        "batch_size": BATCH_SIZE,
    }
    if arguments.only != "scores":
        figures |= speeds(arguments, encoder, data)
        targets |= SPEED_TARGETS
    if arguments.only == "speed" or not arguments.model:
        why = "not asked for" if arguments.only else "left out: the model is untrained"
        return figures | {"scores": why}, targets
    targets |= {f"standard_errors_apart_{task_name}": STANDARD_ERRORS_APART for task_name in arguments.score_tasks}
    return figures | scores(arguments, encoder, data), targets


def fingerprint(model: Path) -> str:
    """The beginning of the weights' SHA-256."""
    return model_fingerprint(model)["model weights"][:10]


def speeds(arguments: argparse.Namespace, encoder: Encoder, data: dict[str, Rows]) -> dict[str, Any]:
    """Training rows a second of the three sides, and ours as a multiple of the others'."""
    figures: dict[str, Any] = {"precision": arguments.precision, "rounds": arguments.rounds, "rows": arguments.rows}
    for task_name, rows in data.items():
        work = FineTuning(task_name, LEARNING_RATE, BATCH_SIZE, 1, arguments.precision)
        rounds = list(speeds_in_turns(work, rows, encoder, arguments.rounds, arguments.rows))
        figures[f"tokens_per_row_{task_name}"] = round(float(rows["train"].lengths.mean()), 1)
        for side in rounds[0]:
            rates = [turn[side] for turn in rounds]
            figures[f"{side}_{task_name}_sequences_per_second"] = round(statistics.median(rates), 2)
            figures[f"{side}_{task_name}_repeats"] = [round(rate, 2) for rate in rates]
        for side in ("padded", "dynamic"):
            ratio = statistics.median(turn["ours"] / turn[side] for turn in rounds)
            figures[f"vs_{side}_{task_name}"] = round(ratio, 2)
    return figures


def speeds_in_turns(
    work: FineTuning, rows: Rows, encoder: Encoder, num_rounds: int, num_rows: int
) -> Iterator[dict[str, float]]:
    """Each round's rows a second by side; a round has rows of its own, drawn from the whole training set."""
    sides = (Ours(), HuggingFace("max_length"), HuggingFace("longest"))
    for number in range(1 + num_rounds):  # the first one warms
        say(f"speed of {work.task_name}: round {number} of {num_rounds} ...")
        drawn = random_rows(rows, num_rows if number else WARMING_ROWS, seed=number)
        rates = {side.name: side.run(work, number, drawn, encoder, CPU).rows_per_second for side in sides}
        if number:
            yield rates


def random_rows(rows: Rows, num_rows: int, seed: int) -> Rows:
    """Training rows of all lengths, and a few to evaluate on, which is not timed."""
    places = np.random.default_rng(seed).permutation(len(rows["train"]))[:num_rows]
    return {"train": some_rows(rows["train"], places), "dev": some_rows(rows["dev"], np.arange(WARMING_ROWS))}


def scores(arguments: argparse.Namespace, encoder: Encoder, data: dict[str, Rows]) -> dict[str, Any]:
    """Development scores of ours and of the dynamic Trainer over the seeds, and how far apart they are."""
    figures: dict[str, Any] = {"score_precision": arguments.score_precision, "seeds": arguments.seeds}
    trials = KeptTrials(arguments.trials)
    for task_name in arguments.score_tasks:
        rows, num_epochs = data[task_name], arguments.epochs or EPOCHS[task_name]
        work = FineTuning(task_name, LEARNING_RATE, BATCH_SIZE, num_epochs, arguments.score_precision)
        found: dict[str, list[Outcome]] = {"ours": [], "dynamic": []}
        for seed in range(1, 1 + arguments.seeds):
            for side in (Ours(), HuggingFace("longest")):
                found[side.name].append(trials.outcome(side, work, seed, rows, encoder))
        figures[f"epochs_{task_name}"] = num_epochs
        for side, outcomes in found.items():
            figures[f"{side}_{task_name}_scores"] = [round(outcome.score, 4) for outcome in outcomes]
            figures[f"{side}_{task_name}_seconds"] = round(statistics.median(outcome.seconds for outcome in outcomes))
        figures |= comparison(task_name, *([outcome.score for outcome in outcomes] for outcomes in found.values()))
    return figures


def comparison(task_name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Means and standard deviations of the scores, and how far apart the means are."""
    figures = {
        f"ours_{task_name}_mean": statistics.mean(ours),
        f"ours_{task_name}_std": statistics.stdev(ours),
        f"dynamic_{task_name}_mean": statistics.mean(theirs),
        f"dynamic_{task_name}_std": statistics.stdev(theirs),
        f"standard_errors_apart_{task_name}": standard_errors_apart(ours, theirs),
    }
    return {name: round(value, 4) for name, value in figures.items()}


class KeptTrials:
    """Finished trials, in a file where there is one, so that what is stopped goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._trials = read_json(path, "the finished trials") if path and path.exists() else []

    def outcome(self, side: Ours | HuggingFace, work: FineTuning, seed: int, rows: Rows, encoder: Encoder) -> Outcome:
        """Of the trial with exactly these settings, run only if it is not there yet."""
        model = fingerprint(encoder.folder)
        settings = {"side": side.name, **asdict(work), "seed": seed, "model": model, "threads": torch.get_num_threads()}
        for trial in self._trials:
            if trial["settings"] == settings:
                return Outcome(**trial["outcome"])
        outcome = side.run(work, seed, rows, encoder, CPU)
        say(f"{work.task_name}, seed {seed}, {side.name}: {outcome.score:.4f} in {outcome.seconds:.0f} s")
        self._trials.append({"settings": settings, "outcome": asdict(outcome)})
        if self._path:
            write_json(self._path, self._trials)
        return outcome


if __name__ == "__main__":
    main()
