"""Real processes without a launcher: each is told who it is, and nobody ends the others when one goes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "several_processes.py"


@pytest.fixture
def start_several(free_port, tmp_path) -> Callable[[int, str], list[subprocess.Popen]]:
    """Starts several_processes.py that many times in a mode; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def start(world_size: int, mode: str) -> list[subprocess.Popen]:
        for rank in range(world_size):
            who = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
            environment = {**os.environ, **{name: str(value) for name, value in who.items()}, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(SCRIPT), str(tmp_path), mode]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()
