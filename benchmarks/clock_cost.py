"""What the clock costs a step: one decision that all ranks agree on, against a BERT-base step on the same processes.

    python benchmarks/clock_cost.py [--decisions 2000] [--steps 3] [--record]

Real processes over gloo on the CPU, 1, 2 and 4 of them. A decision is timed from a barrier on, so that no process waits
for one that is late with other work; of each decision the slowest process counts. On two processes, steps of BERT-base
follow (8 full sequences of 128 tokens a process), with a decision before each, timed in the same way: there the caches
hold the model and not the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import numpy as np
import torch

from benchmarks.gpu_rows import RowSource, to_batch
from benchmarks.shared import Targets, misses, record, table
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Batch
from pretrain.budget import Budget, Cadence
from pretrain.director import Director
from pretrain.ds_config import load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.processes import Processes, leave, start_processes

WORLD_SIZES = (1, 2, 4)
STEPS_ON = 2
SOURCE = RowSource(vocab_size=30522, max_seq_length=128, max_predictions_per_seq=20)
SEQUENCES_A_PROCESS = 8
WARMING_DECISIONS = 100
DAY = 86400.0
TARGETS: Targets = {
    "share_of_a_step_percent": ("at most", 1),
    "share_of_a_step_percent_95": ("at most", 1),
    "share_of_a_step_percent_between_steps": ("at most", 1),
}


def main() -> None:
    """Measure everything, print a table, and one line of JSON; exit code 1 where the clock costs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=2000, help="of each number of processes")
    parser.add_argument("--steps", type=int, default=3, help="of BERT-base, after one that warms")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure_in_process(arguments.decisions, arguments.steps)
        return
    figures = measure(arguments.decisions, arguments.steps)
    print(table(figures, TARGETS))
    if arguments.record:
        record(figures, "cpu", "clock_cost")
    print(json.dumps(figures))
    if wrong := misses(figures, TARGETS):
        sys.exit(f"missed: {', '.join(wrong)}")


def measure(decisions: int, steps: int) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {"decisions": decisions, "steps": steps, "sequences_a_process": SEQUENCES_A_PROCESS}
    for world_size in WORLD_SIZES:
        print(f"{world_size} processes ...", file=sys.stderr)
        measured = run_processes(world_size, decisions, steps if world_size == STEPS_ON else 0)
        median, high = (float(np.quantile(measured["decisions"], share)) for share in (0.5, 0.95))
        figures |= {f"microseconds_{world_size}": round(1e6 * median, 1)}
        figures |= {f"microseconds_95_{world_size}": round(1e6 * high, 1)}
        if world_size == STEPS_ON:
            step, between = float(np.median(measured["steps"])), float(np.median(measured["between_steps"]))
            figures |= {
                "microseconds_between_steps": round(1e6 * between, 1),
                "step_seconds": round(step, 3),
                "share_of_a_step_percent": round(100 * median / step, 5),
                "share_of_a_step_percent_95": round(100 * high / step, 5),
                "share_of_a_step_percent_between_steps": round(100 * between / step, 5),
            }
    return figures


def run_processes(world_size: int, decisions: int, steps: int) -> dict[str, list[float]]:
    """Seconds, measured by ``world_size`` processes together."""
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(world_size)]
    command += [__file__, "--child", "--decisions", str(decisions), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_in_process(decisions: int, steps: int) -> None:
    """One process's part; rank 0 prints what all have measured."""
    processes = start_processes()
    torch.set_num_threads(1)
    director = director_of(processes)
    measured: dict[str, list[float]] = {
        "decisions": [timed_decision(director, processes, step) for step in range(WARMING_DECISIONS + decisions)]
    }
    measured["decisions"] = measured["decisions"][WARMING_DECISIONS:]
    measured |= measure_steps(director, processes, steps) if steps else {}
    slowest = {name: processes.maximum(*values) for name, values in measured.items()}
    processes.barrier()
    if processes.rank == 0:
        print(json.dumps(slowest))
    leave(0)


def director_of(processes: Processes) -> Director:
    """With all that a run lets it decide on, on a day's budget; nothing becomes due meanwhile."""
    budget = Budget(DAY, None)
    budget.start(0)
    cadences = Cadence(0.5, 0.25, 0.05), Cadence(0.5)
    return Director(budget, *cadences, {1: 0.5}, lambda: None, processes.maximum, processes.rank)


def timed_decision(director: Director, processes: Processes, step: int) -> float:
    """Seconds that one takes where all begin together."""
    processes.barrier()
    started = time.perf_counter()
    decision = director.decide(step)
    seconds = time.perf_counter() - started
    assert decision.stopped_by is None
    return seconds


def measure_steps(director: Director, processes: Processes, steps: int) -> dict[str, list[float]]:
    """Seconds of BERT-base's steps, and of the decisions before them."""
    torch.manual_seed(0)
    architecture = resolve(ModelConfig(preset="bert-base"), SOURCE.vocab_size, SOURCE.max_seq_length, pad_token_id=0)
    model = MaskedLanguageModel(architecture)
    plan = BatchPlan(SEQUENCES_A_PROCESS * processes.world_size, SEQUENCES_A_PROCESS, processes.world_size)
    optimizer = build_optimizer(model, OptimizerConfig())
    engine = PretrainEngine(model, optimizer, load_ds_config("auto"), plan, 0.0, processes)
    measured: dict[str, list[float]] = {"between_steps": [], "steps": []}
    for step in range(1 + steps):
        batch = batch_of(processes, step)
        measured["between_steps"].append(timed_decision(director, processes, step))
        started = time.perf_counter()
        engine.train_step(batch.micro_batches, batch.workload.predictions * processes.world_size, 1.0, step)
        processes.barrier()
        measured["steps"].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in measured.items()}  # the first one warms


def batch_of(processes: Processes, step: int) -> Batch:
    """One process's full rows."""
    generator = np.random.default_rng([step, processes.rank])
    rows = SOURCE.full_rows(SEQUENCES_A_PROCESS, generator)
    return to_batch(rows, SOURCE.padded_shape(SEQUENCES_A_PROCESS), processes.device)


if __name__ == "__main__":
    main()
