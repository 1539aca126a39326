"""Whatever asks a run to leave before its end: it saves at the next step boundary, says why, and goes on later."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from common.folders import only_writer
from pretrain.interruptions import Interruptions
from pretrain.run_record import read_metrics

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 150
CONFIG = """\
model: {preset: bert-tiny, hidden_size: 32}
time_budget: null
max_steps: 150
train_batch_size: 24
micro_batch_size: 4
validation_interval: 100%
early_validation_interval: null
checkpoint_interval: 50%
log_interval: 1
"""


class Run:
    """A run of real processes, with its log."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder = folder / "run"
        self._log = folder / "log.txt"
        (folder / "config.yaml").write_text(CONFIG)
        self._arguments = ["--config", folder / "config.yaml", "--data_dir", data_dir, "--output_dir", self.folder]
        self._process: subprocess.Popen | None = None

    def start(self, *launcher: str, **environment: str) -> subprocess.Popen:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*(launcher or (sys.executable,)), "run_pretraining.py", *map(str, self._arguments)],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._process

    def wait_for_step(self, number: int) -> None:
        self._wait(lambda: (steps := self.logged_steps()) and max(steps) >= number)

    def wait_until_all_have_left(self) -> None:
        self._wait(lambda: not self.processes())

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def logged_steps(self) -> list[int]:
        return [event["step"] for event in read_metrics(self.folder) if event["event"] == "train"]

    def processes(self) -> list[psutil.Process]:
        """All whose command line names the run: launchers and ranks."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or ())
            if str(self.folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "hf" / "model.safetensors")


@pytest.fixture
def run(data_dir, tmp_path) -> Iterator[Run]:
    run = Run(tmp_path, data_dir)
    yield run
    for process in run.processes():
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), data_dir)
    assert run.start().wait(timeout=200) == 0, run.log()
    return run


def status(run: Run) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pretrain", "status", str(run.folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGINT"))]
)
def test_a_signal_ends_a_run_with_the_code_to_start_it_again_and_costs_nothing(name, run, uninterrupted) -> None:
    process = run.start()
    run.wait_for_step(5)
    process.send_signal(signal.Signals[name])
    assert process.wait(timeout=60) == 75, run.log()
    left = run.summary()
    assert left["stopped_by"] == name
    assert 5 <= left["steps"] < STEPS
    assert left["validation_loss"] is None
    assert (run.folder / "checkpoints" / "latest").read_text().strip() == f"step-{left['steps']:08d}"
    told = status(run)
    assert (told.returncode, f"stopped by {name} after step {left['steps']}" in told.stdout) == (75, True)
    if name != "SIGTERM":
        return
    assert run.start().wait(timeout=200) == 0, run.log()
    assert status(run).returncode == 0
    assert run.logged_steps() == list(range(1, STEPS + 1)), "no step is lost, none made twice"
    expected = uninterrupted.weights()
    for tensor_name, tensor in run.weights().items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name


def test_a_signal_to_one_rank_ends_them_all_together(run, free_port) -> None:
    run.start(str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port))
    run.wait_for_step(5)
    (rank_one,) = (process for process in run.processes() if process.environ().get("RANK") == "1")
    rank_one.send_signal(signal.SIGUSR1)
    run.wait_until_all_have_left()
    assert run.summary()["stopped_by"] == "SIGUSR1"
    assert "Traceback (most recent call last)" not in run.log().split("stopped by SIGUSR1")[0]


def test_a_run_whose_slurm_allocation_is_about_to_end_leaves_and_says_so(run) -> None:
    process = run.start(SLURM_JOB_END_TIME=str(int(time.time()) + 100))  # the margin is two minutes by default
    assert process.wait(timeout=100) == 75, run.log()
    assert (run.summary()["stopped_by"], run.summary()["steps"]) == ("slurm_end", 0)
    assert "nothing to save yet" in run.log()


@pytest.mark.parametrize("victim", ["deepspeed", pytest.param("deepspeed.launcher.launch", marks=pytest.mark.slow)])
def test_ranks_whose_launcher_has_died_save_and_leave_and_the_next_start_goes_on(victim, run) -> None:
    launcher = (str(BIN / "deepspeed"), "--num_gpus", "2")
    process = run.start(*launcher)
    run.wait_for_step(5)
    if victim != "deepspeed":
        (process,) = (one for one in run.processes() if victim in one.cmdline())
    process.send_signal(signal.SIGKILL)
    again = run.start(*launcher)
    assert again.wait(timeout=200) == 0, run.log()
    assert run.logged_steps() == list(range(1, STEPS + 1)), "no second writer, nothing lost"
    assert "stopped by launcher_died" in run.log()
    starts = [event["step"] for event in read_metrics(run.folder) if event["event"] == "start"]
    assert len(starts) == 2
    assert starts[1] >= 5


def test_a_second_start_waits_for_the_first_and_then_names_it(tmp_path) -> None:
    holder = """\
import sys, time, pathlib
from common.folders import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    refusal = rf"process {process.pid} on \S+ is still after 1 s at work in .*: wait for its end, or stop it"
    with pytest.raises(Exception, match=refusal), only_writer(tmp_path, wait_seconds=1.0):
        pass
    with only_writer(tmp_path, wait_seconds=30.0):
        assert process.wait(timeout=10) == 0
    process.stdout.close()


def test_signals_that_were_switched_off_stay_off_and_a_second_ctrl_c_ends_the_process() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruptions = Interruptions(margin_seconds=120.0)
    with interruptions.noted():
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruptions.pending() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interruptions.pending() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("ends_in", "expected"), [(119, "slurm_end"), (121, None), (None, None)])
def test_the_margin_before_the_end_of_an_allocation(ends_in, expected, monkeypatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "" if ends_in is None else str(1_000_000 + ends_in))
    assert Interruptions(margin_seconds=120.0).pending() == expected
