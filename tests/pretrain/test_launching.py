"""Every way to launch a run trains the same model: two "nodes" are two groups of processes on this machine.

The files of ``docs/slurm`` run as they are; only ``srun`` and ``scontrol`` are stand-ins.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SLURM_FILES = REPOSITORY / "docs" / "slurm"
TIMEOUT = 120
CONFIG = """\
model: {preset: bert-tiny, hidden_size: 32, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
time_budget: null
max_steps: 4
train_batch_size: 24
micro_batch_size: 4
optimizer: {learning_rate: 5.0e-3}
validation_interval: 100%
early_validation_interval: null
checkpoint_interval: 100%
log_interval: 1
"""
SRUN = """\
#!{python}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
size = int(os.environ["SLURM_NTASKS"])
ranks = [dict(os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(size)]
tasks = [subprocess.Popen(command, env=environment) for environment in ranks]
open("{pid}", "w").write(str(os.getpid()))
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """\
#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {log}; fi
"""


def start(command: list, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Nothing that the test has started outlives it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_a_step(run: Path, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(config, data_dir, tmp_path_factory) -> Path:
    """One process, without a launcher."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    finish([start([sys.executable, *script(config, data_dir, run)])])
    return run


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of an allocation of two tasks, with stand-ins for Slurm's commands."""
    commands = {
        "srun": SRUN.format(python=sys.executable, pid=tmp_path / "srun.pid"),
        "scontrol": SCONTROL.format(log=tmp_path / "scontrol.log"),
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "1",
    }


def script(config: Path, data_dir: Path, run: Path) -> list:
    return ["run_pretraining.py", "--config", config, "--data_dir", data_dir, "--output_dir", run]


def assert_same_model(run: Path, expected: Path, world_size: int) -> None:
    assert json.loads((run / "summary.json").read_text())["hardware"].startswith(f"{world_size} x ")
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.slow
def test_two_nodes_of_the_slurm_file_meet_without_ssh_and_train_the_model_of_one_process(
    alone, slurm, config, data_dir, tmp_path
) -> None:
    run = tmp_path / "run"
    finish([start(["bash", SLURM_FILES / "several-nodes.sbatch", config, data_dir, run], slurm)])
    assert_same_model(run, alone, world_size=2)


@pytest.mark.slow
def test_a_signal_before_the_end_of_the_allocation_saves_and_requeues_the_job(
    slurm, config, data_dir, tmp_path
) -> None:
    run = tmp_path / "seed-7"
    arguments = [config, data_dir, tmp_path, "--max_steps", 100_000]
    job = start(["bash", SLURM_FILES / "preemptible.sbatch", *arguments], slurm)
    try:
        wait_for_a_step(run, job)
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
        output, _ = job.communicate(timeout=TIMEOUT)
    finally:
        end(job)
    assert job.returncode == 75, output[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert json.loads((run / "summary.json").read_text())["stopped_by"] == "SIGUSR1"
    assert (run / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_train_the_model_of_one_process(alone, config, data_dir, tmp_path, free_port) -> None:
    run = tmp_path / "run"
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n", encoding="utf-8")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", free_port]
    launcher = [BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh", *meeting]
    nodes = [start([*launcher, "--node_rank", node, *script(config, data_dir, run)]) for node in (0, 1)]
    finish(nodes)
    assert_same_model(run, alone, world_size=2)
