"""A grid whose processes are killed at random moments ends in the very table of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.study import Attempt, TrialStore
from run_glue_grid import main
from tests.finetune.grids import arguments, elsewhere, outcome, output_of, write_config

REPOSITORY = Path(__file__).parents[2]
TASKS = ["sst2", "stsb"]
LONG_TRIALS = {"grids": [{"tasks": TASKS, "learning_rate": [1e-3, 3e-3], "batch_size": [8], "num_epochs": [100]}]}
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def workers(pid: int) -> list[int]:
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@dataclass
class Killer:
    """Runs a grid's command, and kills its processes."""

    argv: list[str]
    output_dir: Path
    log: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("a") as log:
            command = [sys.executable, str(REPOSITORY / "run_glue_grid.py"), *self.argv]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY)

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def recorded(self) -> dict:
        """The results so far, with the seconds that each took."""
        if not (self.output_dir / "cache" / "splits.json").exists():  # written after the studies
            return {}
        store = TrialStore(f"sqlite:///{self.output_dir / 'trials.db'}")
        return {cell: result for name in TASKS for cell, result in store.results(name).items()}

    def running(self) -> list[Attempt]:
        """What is being run, by processes that live."""
        attempts = TrialStore(f"sqlite:///{self.output_dir / 'trials.db'}").running(TASKS)
        return [attempt for attempt in attempts if f" {self.process.pid} " in attempt.worker]

    def phase(self) -> str:
        running = self.running()
        saving = list((self.output_dir / "models").rglob(".*.tmp"))
        doing = ", ".join(str(attempt.cell) for attempt in running) or "no trial running"
        return f"{len(self.recorded())} done; {doing}{'; a model half saved' if saving else ''}"

    def kill_worker(self, which: int) -> None:
        wait_until(lambda: self.is_over() or workers(self.process.pid), 60, "a worker")
        pids = workers(self.process.pid)
        if pids:
            os.kill(pids[which % len(pids)], signal.SIGKILL)

    def kill_coordinator(self) -> None:
        family = children(self.process.pid)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(map(is_running, family)), 20, "the workers to end with their parent")


def weights(output_dir: Path) -> dict[str, bytes]:
    models = output_dir / "models"
    return {str(path.relative_to(models)): path.read_bytes() for path in models.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_coordinator_cost_nothing_that_was_finished(
    finished_grid: list[str], tmp_path: Path
):
    output_dir = tmp_path / "G"
    killer = Killer(elsewhere(finished_grid, output_dir), output_dir, tmp_path / "log")
    killer.start()
    wait_until(lambda: killer.is_over() or len(killer.recorded()) >= 2, 120, "trials")
    killer.kill_worker(0)
    wait_until(lambda: killer.is_over() or len(killer.recorded()) >= 5, 120, "trials")
    assert not killer.is_over(), killer.log.read_text()
    killer.kill_coordinator()
    before = killer.recorded()
    main(killer.argv)
    assert before.items() <= killer.recorded().items(), "no finished trial ran again"
    undisturbed = output_of(finished_grid)
    assert outcome(output_dir) == outcome(undisturbed)
    assert weights(output_dir) == weights(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_at_random_moments_change_nothing(model_folder: Path, glue_dir: Path, tmp_path: Path):
    """Kills before the first finished trial are not counted. With ``-s`` each is told with its phase."""
    config = write_config(tmp_path, **LONG_TRIALS)
    undisturbed, output_dir = tmp_path / "undisturbed", tmp_path / "G"
    main(arguments(config, model_folder, undisturbed, glue_dir))
    killer = Killer(arguments(config, model_folder, output_dir, glue_dir), output_dir, tmp_path / "log")
    chance, num_kills, before = random.Random(0), 0, {}
    killer.start()
    wait_until(lambda: killer.is_over() or killer.recorded(), 120, "the first trial")
    while num_kills < 20:
        if chance.random() < 0.75:  # one in four may come while processes start
            wait_until(lambda: killer.is_over() or killer.running(), 120, "a trial")
        time.sleep(chance.uniform(0, 3))
        assert not killer.is_over(), f"finished after {num_kills} kills: {killer.log.read_text()}"
        phase, target = killer.phase(), chance.choice(["coordinator", "worker"])
        if target == "worker":
            killer.kill_worker(chance.randrange(2))
        else:
            killer.kill_coordinator()
        assert before.items() <= killer.recorded().items(), "no finished trial ran again"
        before = killer.recorded()
        num_kills += 1
        print(f"kill {num_kills}: the {target}; {phase}", flush=True)
        if target == "coordinator":
            killer.start()
    wait_until(killer.is_over, 1200, "the end")
    assert killer.process.returncode == 0, killer.log.read_text()
    assert before.items() <= killer.recorded().items()
    assert outcome(output_dir) == outcome(undisturbed)
    assert weights(output_dir) == weights(undisturbed)
    assert outcome(output_dir)["failures"] == []
