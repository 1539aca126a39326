"""Runs that are killed at random moments, and whether anything is lost: at least 20 SIGKILLs, each with its phase.

    python benchmarks/kills.py [--kills 20] [--seconds 24] [--seed 1] [--record]

Two processes under the `deepspeed` launcher train a small model by the clock. Its embeddings are large and much is held
out, so that saving and validating last long enough to be hit. A kill hits all processes, one rank, or one of the two
processes of the launcher; what it leaves has to leave by itself. Then the same command is started again, in half of
these cases while the others are still leaving. A run is killed several times and then completes. Before a kill a start
has made a step of its own, unless only the closing was left. Every figure is read from outside: processes by their
command line, the phase from status.json a moment before the kill, the rest from metrics.jsonl and the checkpoints.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

from benchmarks.kill_runs import CHECKPOINT_SHARE, HEAD, PHASES, TARGETS, VALIDATION_SHARE, Attack, Kill, Wish, as_cells
from benchmarks.launches import launched_run
from benchmarks.shared import Targets, markdown, misses, record, table
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source

KILLS_A_RUN = 7
CONFIG = """\
model: {{preset: bert-tiny, hidden_size: 64, max_position_embeddings: 300000, hidden_dropout_prob: 0.0, \
attention_probs_dropout_prob: 0.0}}
time_budget: {seconds}s
train_batch_size: 64
micro_batch_size: 32
optimizer: {{learning_rate: 2.0e-3}}
checkpoint_interval: {checkpoint:.0%}
validation_interval: {validation:.0%}
early_validation_interval: null
log_interval: 1
"""


def wishes_of(kills: int, generator: random.Random) -> list[list[Wish]]:
    """The kills to come, a list a run: every phase with every target in turn, in a random order, closing last."""
    wishes = []
    for number in range(kills):
        phase, target = PHASES[number % len(PHASES)], TARGETS[number % len(TARGETS)]
        at_once = target != "all" and generator.random() < 0.5
        passed_over = generator.choice([0, 0, 1]) if phase in ("validation", "saving") else 0
        wishes.append(Wish(phase, target, passed_over, generator.random(), at_once))
    generator.shuffle(wishes)
    runs = -(-kills // KILLS_A_RUN)
    return [sorted(wishes[run::runs], key=lambda wish: wish.phase == "closing") for run in range(runs)]


def main() -> None:
    """Kill, print tables, and one line of JSON; exit code 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seconds", type=int, default=24, help="time budget of each run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of the order")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    figures = measure(arguments.kills, arguments.seconds, arguments.seed, folder)
    targets = targets_of(arguments.kills)
    wrong = misses(figures, targets)
    print(markdown([HEAD, *(as_cells(Kill(**row)) for row in figures["rows"])]), "\n")
    print(table({name: value for name, value in figures.items() if not isinstance(value, list)}, targets))
    for line in figures["wrong"]:
        print(line)
    if arguments.record:
        record(figures, "cpu", "kills")
    print(json.dumps(figures))
    if wrong:
        sys.exit(f"missed: {', '.join(wrong)}; the runs are in {folder}")
    shutil.rmtree(folder)


def measure(kills: int, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    started, generator = time.monotonic(), random.Random(seed)
    data, config = prepare(folder, seconds)
    rows: list[Kill] = []
    ends, wrong, drifts = [], [], []
    waiting = wishes_of(kills, generator)
    planned = len(waiting)
    while waiting and len(ends) < 2 * planned + 1:
        number = len(ends) + 1
        attack = Attack(number, launched_run(folder / f"run-{number}", config, data), seconds, rows)
        unmet, end, failures = attack.carry_out(waiting.pop(0))
        if unmet:
            waiting.append([replace(wish, place=wish.place / 2) for wish in unmet])
        ends.append(end)
        drifts += attack.clock_drifts
        wrong += [f"run {number}, at its end: {failure}" for failure in failures]
    wrong += [f"kill {row.number}: {what}" for row in rows for what in row.wrong]
    return {
        "kills": len(rows),
        **{f"kills_in_{phase}": count for phase, count in in_all(PHASES, [row.phase for row in rows]).items()},
        **{f"kills_of_{target}": count for target, count in in_all(TARGETS, [row.target for row in rows]).items()},
        "checks_failed": len(wrong),
        "runs": len(ends),
        "time_budget_seconds": seconds,
        "checkpoint_interval_seconds": round(CHECKPOINT_SHARE * seconds, 3),
        "lost_seconds_max": max((row.lost_seconds or 0.0 for row in rows), default=0.0),
        "gone_seconds_max": max((row.gone_seconds or 0.0 for row in rows), default=0.0),
        "budget_error_seconds_max": max((abs(end["error_seconds"]) for end in ends if end), default=0.0),
        "longest_step_seconds": max((end["longest_step_seconds"] for end in ends if end), default=0.0),
        "clock_drift_seconds_max": round(max(map(abs, drifts), default=0.0), 3),
        "seed": seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "rows": [asdict(row) for row in rows],
        "ends": ends,
        "wrong": wrong,
    }


def in_all(names: tuple[str, ...], found: list[str]) -> dict[str, int]:
    """How often each was found, 0 included."""
    counts = Counter(found)
    return {name.replace(" ", "_").replace(".", "_"): counts[name] for name in names}


def targets_of(kills: int) -> Targets:
    """What the figures have to be: three in each phase where there are enough kills for it."""
    in_each = min(3, kills // len(PHASES))
    return {
        "kills": ("at least", kills),
        **{f"kills_in_{phase}": ("at least", in_each) for phase in PHASES},
        "checks_failed": ("at most", 0),
        "clock_drift_seconds_max": ("at most", 0.5),
    }


def prepare(folder: Path, seconds: int) -> tuple[Path, Path]:
    """The data folder, much of it held out, and the configuration."""
    data, config = folder / "data", folder / "config.yaml"
    text = CONFIG.format(seconds=seconds, checkpoint=CHECKPOINT_SHARE, validation=VALIDATION_SHARE)
    config.write_text(text, encoding="utf-8")
    sizes = {"vocab_size": 800, "max_seq_length": 32, "max_predictions_per_seq": 5, "dupe_factor": 2}
    build(DataConfig([Source("demo", megabytes=1)], "train", validation_fraction=0.45, **sizes), data)
    return data, config


if __name__ == "__main__":
    main()
