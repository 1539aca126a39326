"""Who dies with whom: a process sees that one of those that have launched it has ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

CHAIN = """\
import os, pathlib, subprocess, sys, time
from common.process_tree import COORDINATOR, is_broken, launcher_chain
folder, generation = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def tell(name):
    (folder / f"{name}.tmp").write_text(str(os.getpid()))
    os.rename(folder / f"{name}.tmp", folder / name)
tell(f"pid-{generation}")
if generation < 3:
    if generation == 0:
        os.environ[COORDINATOR] = str(os.getpid())
    sys.exit(subprocess.call([sys.executable, "-c", sys.argv[3], str(folder), str(generation + 1), sys.argv[3]]))
while not (folder / "look").exists():
    time.sleep(0.01)
chain = launcher_chain()
tell("broken at once" if is_broken(chain) else "whole")
while not is_broken(chain):
    time.sleep(0.01)
tell("broken")
"""


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30.0
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def tree(tmp_path) -> Iterator[subprocess.Popen]:
    """A coordinator, two processes below it, and a rank below these; nothing of it outlives the test."""
    command = [sys.executable, "-c", CHAIN, str(tmp_path), "0", CHAIN]
    coordinator = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    wait_for(tmp_path / "pid-3")
    yield coordinator
    with contextlib.suppress(ProcessLookupError):
        os.killpg(coordinator.pid, signal.SIGKILL)
    coordinator.wait()


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("looks_before", [True, False])
def test_a_rank_sees_the_death_of_its_coordinator_and_of_each_process_between(
    tree, tmp_path, victim, looks_before
) -> None:
    if looks_before:
        (tmp_path / "look").touch()
        wait_for(tmp_path / "whole")
        time.sleep(0.1)
        assert not (tmp_path / "broken").exists()
    os.kill(int((tmp_path / f"pid-{victim}").read_text()), signal.SIGKILL)
    if victim == 0:
        tree.wait()
    time.sleep(0.05)
    (tmp_path / "look").touch()
    wait_for(tmp_path / "broken")
    assert (tmp_path / "broken at once").exists() == (not looks_before)
