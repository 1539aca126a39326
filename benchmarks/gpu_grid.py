"""Fine-tuning on a GPU: trials an hour against Hugging Face's Trainer in a loop, several at once, and what they score.

    python benchmarks/gpu_grid.py --model DIR [--glue DIR] [--seeds 5] [--self-check]

DIR of --glue holds CoLA/ and RTE/; without it the demo's synthetic tasks stand in, and the figures say so. Ours and the
Trainer, with batches padded to their longest row, take turns seed by seed: the same weights, batches of 32, optimizer,
schedule and precision; a trial's time is all of it, model and evaluation included (ours evaluates after each epoch, the
Trainer once). Then several processes run trials of ours on the same GPU, all starting at one moment. What pretraining
has given is the difference to the same trials from random weights. `benchmarks/gpu.py` starts this in a process of its
own, because the Trainer would take a process group that is already there for a cluster's.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import torch

from benchmarks.glue_sides import FineTuning, HuggingFace, Ours, Outcome, load_rows, standard_errors_apart
from benchmarks.gpu_timing import say
from data_prep.demo_benchmark import write_demo_benchmark
from finetune.model import Encoder

GLUE, DEMO = {"cola": 3, "rte": 5}, {"demo_sentiment": 5, "demo_entailment": 5}  # task -> epochs
AT_ONCE = (1, 2, 4, 8)
MEETING_SECONDS = 600  # until every process has loaded and warmed


@dataclass(frozen=True)
class Place:
    """What a process needs to run trials."""

    glue_dir: Path
    model: Path
    device: str


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--glue", type=Path, help="folder with CoLA/ and RTE/")
    parser.add_argument("--seeds", type=int, default=5, help="trials of every kind; 2 or more")
    parser.add_argument("--self-check", action="store_true", help="one epoch, two seeds, two at once, on a CPU")
    arguments = parser.parse_args()
    if torch.cuda.is_available() == arguments.self_check:
        sys.exit("--self-check is for a CPU" if arguments.self_check else "there is no GPU; on a CPU try --self-check")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder))))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    tiny, device = arguments.self_check, torch.device("cpu" if arguments.self_check else "cuda")
    if not arguments.glue:
        write_demo_benchmark(folder / "demo", seed=42)
    seeds, at_once = (range(1, 3), AT_ONCE[:2]) if tiny else (range(1, 1 + arguments.seeds), AT_ONCE)
    figures: dict[str, Any] = {"grid_data": "GLUE" if arguments.glue else "synthetic (not comparable)"}
    for task_name, num_epochs in (GLUE if arguments.glue else DEMO).items():
        work = FineTuning(task_name, 5e-5, 32, 1 if tiny else num_epochs, "bf16")
        place = Place(arguments.glue or folder / "demo", arguments.model, str(device))
        figures |= one_at_a_time(work, place, seeds) | several_at_once(work, place, seeds, at_once)
    return figures


def one_at_a_time(work: FineTuning, place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    """Trials an hour and scores of ours, of the Trainer, and of ours from random weights."""
    trials = Trials(work, place)
    kinds = {
        "ours": (Ours(), work),
        "trainer": (HuggingFace("longest"), work),
        "untrained": (Ours(), replace(work, initialization="random")),
    }
    found: dict[str, list[Outcome]] = {kind: [] for kind in kinds}
    for number, seed in enumerate([seeds[0], *seeds]):
        for kind, (side, what) in kinds.items():
            say(f"{work.task_name}: {kind}, seed {seed}{'' if number else ', to warm up'} ...")
            outcome = trials.run(side, what, seed)
            if number:
                found[kind].append(outcome)
    scores = {kind: [outcome.score for outcome in outcomes] for kind, outcomes in found.items()}
    seconds = {kind: [outcome.seconds for outcome in outcomes] for kind, outcomes in found.items()}
    ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds["trainer"], seconds["ours"], strict=True))
    name = work.task_name
    return {
        f"grid_{name}_epochs": work.num_epochs,
        **{f"grid_{name}_{kind}_trials_per_hour": round(3600 / statistics.median(seconds[kind]), 1) for kind in kinds},
        f"grid_{name}_vs_trainer": round(ratio, 3),
        **{f"grid_{name}_{kind}_score": round(statistics.mean(scores[kind]), 4) for kind in kinds},
        f"grid_{name}_standard_errors_apart": round(standard_errors_apart(scores["ours"], scores["trainer"]), 3),
        f"grid_{name}_gain_of_pretraining": round(
            statistics.mean(scores["ours"]) - statistics.mean(scores["untrained"]), 4
        ),
        f"grid_{name}_scores": scores,
        f"grid_{name}_seconds": seconds,
    }


def several_at_once(
    work: FineTuning, place: Place, seeds: Sequence[int], numbers: Iterable[int]
) -> dict[str, float | str]:
    """Trials an hour of so many processes on one device, each of which runs all seeds."""
    figures: dict[str, float | str] = {}
    for processes in numbers:
        say(f"{work.task_name}: {processes} at once ...")
        seconds = seconds_of_processes(processes, work, place, seeds)
        rate = 3600 * processes * len(seeds) / seconds
        figures[f"grid_{work.task_name}_trials_per_hour_of_{processes}"] = round(rate, 1)
    return figures


def seconds_of_processes(processes: int, work: FineTuning, place: Place, seeds: Sequence[int]) -> float:
    """From the moment when all are ready to the moment when the last one has run its trials.

    Raises:
        torch.OutOfMemoryError: of one of them; the others have been told to give up.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_meet_at, initargs=(context.Barrier(processes),)) as pool:
        futures = [pool.submit(_run_trials, work, place, seeds) for _ in range(processes)]
        wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error  # the one that has broken it, before those that were waiting there
        spans = [future.result() for future in futures]
    return max(end for _, end in spans) - min(start for start, _ in spans)


_barrier: Barrier


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run_trials(work: FineTuning, place: Place, seeds: Sequence[int]) -> tuple[float, float]:
    """A process's start and end, on the machine's clock; it waits for the others, so each takes this up once."""
    try:
        trials = Trials(work, place)
        trials.run(Ours(), replace(work, num_epochs=1), seeds[0])
        _barrier.wait(MEETING_SECONDS)
    except BaseException:
        _barrier.abort()
        raise
    start = time.monotonic()
    for seed in seeds:
        trials.run(Ours(), work, seed)
    return start, time.monotonic()


class Trials:
    """Rows and weights loaded once, for any number of trials of one task."""

    def __init__(self, work: FineTuning, place: Place) -> None:
        if place.device == "cpu":
            torch.set_num_threads(1)
        self._device = torch.device(place.device)
        self._rows = load_rows(work.task_name, place.glue_dir, place.model)
        self._encoder = Encoder(place.model)

    def run(self, side: Ours | HuggingFace, work: FineTuning, seed: int) -> Outcome:
        """One trial."""
        return side.run(work, seed, self._rows, self._encoder, self._device)


if __name__ == "__main__":
    main()
