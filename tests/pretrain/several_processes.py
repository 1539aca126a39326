"""One process of several, without a model: what they decide together, and what becomes of one that dies or hangs.

Started by test_director.py and test_watch.py with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.cli import exit_code
from common.errors import UserError
from pretrain.budget import Budget, Cadence
from pretrain.director import Director
from pretrain.processes import Processes, leave, start_processes
from pretrain.schedule import lr_multiplier
from pretrain.watch import Watch

HOURS = 3600.0


def decide_together(processes: Processes, folder: Path, asks_to_leave: bool) -> None:
    """Rank 1's clock is hours off, rank 2 is slow, and rank 2 may be asked to leave on the way."""
    rank, asked = processes.rank, []

    def clock() -> float:
        return time.monotonic() * (1.0 if rank != 1 else 50.0) + (9 * HOURS if rank == 1 else 0.0)

    budget = Budget(seconds=3.0, max_steps=None, clock=clock)
    budget.start(0)
    director = Director(
        budget, Cadence(0.1), Cadence(0.25), {1: 0.5}, lambda: asked[-1] if asked else None, processes.maximum, rank
    )
    trace, step = [], 0
    while not (decision := director.decide(step)).stopped_by:
        started = time.monotonic()
        time.sleep(0.05 if rank == 2 else 0.01)
        processes.barrier()  # as the gradients' sum does
        budget.record_step(time.monotonic() - started)
        multiplier = lr_multiplier(decision.schedule_position, 0.06)
        trace.append((step, multiplier, decision.validate, decision.save, decision.export))
        step += 1
        if asks_to_leave and rank == 2 and step == 20:
            asked.append("SIGUSR1")
    ended = {"trace": trace, "stopped_by": decision.stopped_by, "elapsed": budget.elapsed()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(ended))


def lose_rank_one(processes: Processes, folder: Path, how: str) -> None:
    """Rank 1 goes wrong after its third step, and the others wait for it."""
    watch = Watch(processes, folder, limit_seconds=9.0)
    with watch.kept():
        for step in range(100):
            watch.enter("training", step)
            if processes.rank == 1 and step == 3:
                time.sleep(2.5)  # long enough to have said where it is
                match how:
                    case "fails":
                        raise UserError("its disk is full")
                    case "breaks":
                        raise ZeroDivisionError("a bug")
                    case "dies":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "stops":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "hangs":
                        watch.enter("training", step, "reading data")
                        time.sleep(60)
            processes.barrier()
            time.sleep(0.02)


def main() -> None:
    processes, folder, mode = start_processes(timedelta(seconds=40)), Path(sys.argv[1]), sys.argv[2]
    if mode in ("decides", "leaves"):
        decide_together(processes, folder, asks_to_leave=mode == "leaves")
    else:
        lose_rank_one(processes, folder, mode)


if __name__ == "__main__":
    leave(exit_code(main))
