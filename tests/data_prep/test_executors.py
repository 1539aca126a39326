"""Units run elsewhere, in bounded memory, and whatever dies on the way ends in every result or in one clear line."""

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from common.errors import UserError
from data_prep import executors
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source
from data_prep.executors import WorkPool, open_pool

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60  # for what takes one or two on an idle machine

UNITS = """
import hashlib
import os
import signal
import time

from common.errors import UserError
from common.folders import atomic_path


def digest(item):
    folder, number, seconds, text = item
    (folder / f"{number}.{os.getpid()}.started").touch()
    time.sleep(seconds)
    found = hashlib.sha256(text).hexdigest()
    with atomic_path(folder / f"{number}.digest") as temporary:
        temporary.write_text(found)
    return number, found


def refuse(item):
    if item == 1:
        raise UserError("row 1 is bad: mend it")
    time.sleep(300)


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def units(tmp_path_factory) -> Iterator[ModuleType]:
    """Work units in a module that other processes can import too."""
    folder = tmp_path_factory.mktemp("units")
    (folder / "work_units.py").write_text(UNITS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("work_units")
    sys.path.remove(str(folder))
    del sys.modules["work_units"]


@pytest.fixture
def python_path(units) -> str:
    """Where other processes find this project and the units."""
    return os.pathsep.join([str(ROOT), str(Path(units.__file__).parent)])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "this did not come"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started_by(folder: Path) -> dict[int, set[int]]:
    """Number of the unit -> the processes that began it."""
    who: dict[int, set[int]] = {}
    for path in folder.glob("*.started"):
        number, pid, _ = path.name.split(".")
        who.setdefault(int(number), set()).add(int(pid))
    return who


def error_line(kind: str, scheduler: str | None, function: Callable, items: Iterable) -> str:
    """What is told to a person when these units fail."""
    with pytest.raises(UserError) as caught, open_pool(kind, 2, scheduler) as pool:
        list(pool.run_all(function, items))
    return str(caught.value)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def test_results_keep_the_items_order(threads) -> None:
    def unit(number: int) -> int:
        time.sleep(0.002 * (number % 5))
        return number * number

    assert list(WorkPool(threads, lambda: 4).run_all(unit, range(100))) == [number**2 for number in range(100)]
    assert list(WorkPool(threads, lambda: 4).run_all(unit, [])) == []


def test_at_most_two_items_a_worker_are_taken_and_unfinished(threads) -> None:
    taken, finished, most = 0, 0, 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal taken, most
        for number in range(60):
            with lock:
                taken += 1
                most = max(most, taken - finished)
            yield number

    def unit(number: int) -> None:
        nonlocal finished
        time.sleep(0.005)
        with lock:
            finished += 1

    list(WorkPool(threads, lambda: 3).run_all(unit, items()))
    assert most == 6


def test_a_slow_unit_keeps_no_worker_idle(threads) -> None:
    last_is_done = threading.Event()

    def unit(number: int) -> bool:
        if number == 0:
            return last_is_done.wait(PATIENCE_SECONDS)
        if number == 50:
            last_is_done.set()
        return True

    assert all(WorkPool(threads, lambda: 2).run_all(unit, range(51)))


def test_workers_that_join_get_work_before_a_unit_ends(threads, monkeypatch) -> None:
    monkeypatch.setattr(executors, "_ASK_AGAIN_SECONDS", 0.01)
    numbers = iter([1, 1])
    together = threading.Barrier(4)
    pool = WorkPool(threads, lambda: next(numbers, 2))
    assert sorted(pool.run_all(lambda _: together.wait(PATIENCE_SECONDS), range(4))) == [0, 1, 2, 3]


def test_processes_give_each_result_once(units, tmp_path) -> None:
    texts = [os.urandom(100_000 * (number % 4)) for number in range(12)]
    with open_pool("processes", 2, None) as pool:
        found = list(pool.run_all(units.digest, [(tmp_path, i, 0, text) for i, text in enumerate(texts)]))
    assert found == [(number, hashlib.sha256(text).hexdigest()) for number, text in enumerate(texts)]
    workers = set.union(*started_by(tmp_path).values())
    assert os.getpid() not in workers
    assert not any(map(is_running, workers))


def test_an_error_comes_through_unchanged_and_ends_all_units(units) -> None:
    begin = time.monotonic()
    assert error_line("processes", None, units.refuse, range(20)) == "row 1 is bad: mend it"
    assert not multiprocessing.active_children()
    assert time.monotonic() - begin < PATIENCE_SECONDS  # the others would sleep for five minutes


def test_a_worker_process_that_dies_ends_in_one_line(units) -> None:
    line = error_line("processes", None, units.die, range(5))
    assert re.fullmatch("a worker process died, .* same command again, .* fewer --num_workers .*", line)
    assert not multiprocessing.active_children()


@pytest.fixture
def parent_at_work(python_path, tmp_path) -> Iterator[subprocess.Popen]:
    """A command with two worker processes, one of them within a unit of five minutes, the other idle."""
    program = """
        import sys
        from pathlib import Path
        import work_units
        from common.cli import run
        from data_prep.executors import open_pool

        folder = Path(sys.argv[1])
        def items():
            while len({path.name.split(".")[1] for path in folder.glob("*.started")}) < 2:
                yield folder, 0, 0.02, b""
            yield folder, 1, 300, b""
        def work():
            with open_pool("processes", 2, None) as pool:
                list(pool.run_all(work_units.digest, items()))
        if __name__ == "__main__":
            run(work)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": python_path}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: 1 in started_by(tmp_path))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_SECONDS)


def test_workers_end_with_a_parent_that_is_killed(parent_at_work, tmp_path) -> None:
    parent_at_work.kill()
    wait_for(lambda: not any(map(is_running, set.union(*started_by(tmp_path).values()))))


def test_ctrl_c_is_left_to_the_parent_which_ends_all_without_a_word(parent_at_work, tmp_path) -> None:
    workers = set.union(*started_by(tmp_path).values())
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)  # time in which a worker that minded would end with a traceback
    assert all(map(is_running, workers))
    os.killpg(parent_at_work.pid, signal.SIGINT)
    _, told = parent_at_work.communicate(timeout=PATIENCE_SECONDS)
    assert (parent_at_work.returncode, told) == (130, "")
    assert not any(map(is_running, workers))


class Cluster:
    """A Dask scheduler, and workers that are as separate as those of different machines."""

    def __init__(self, port: int, python_path: str, folder: Path) -> None:
        self.address = f"tcp://127.0.0.1:{port}"
        self._environment = os.environ | {"PYTHONPATH": python_path}
        self._folder = folder
        self._processes: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", str(port))

    def add_worker(self, *options: str, **environment: str) -> subprocess.Popen:
        worker = ["worker", self.address, "--nthreads", "1", "--local-directory", str(self._folder), *options]
        return self._start(*worker, **environment)

    def _start(self, *command: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *command, "--no-dashboard"]
        with (self._folder / "cluster.log").open("a") as log:
            # In a session of its own, so that a worker dies with the nanny that would start it again.
            where = {"cwd": self._folder, "start_new_session": True, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, env=self._environment | environment, **where)
        self._processes.append(process)
        return process

    def kill(self, process: subprocess.Popen) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
        self._processes.remove(process)

    def close(self) -> None:
        for process in list(self._processes):
            self.kill(process)


@pytest.fixture
def cluster(free_port, python_path, tmp_path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    cluster = Cluster(free_port, python_path, tmp_path)
    yield cluster
    cluster.close()


def test_a_dask_worker_that_is_killed_costs_no_result(cluster, units, tmp_path, recwarn) -> None:
    victim, *_ = [cluster.add_worker("--no-nanny") for _ in range(3)]
    texts = [os.urandom(12_000_000 if number % 10 == 5 else 3_000_000) for number in range(36)]
    killed_in: set[int] = set()

    def caught_within_a_unit() -> bool:
        os.kill(victim.pid, signal.SIGSTOP)  # so that it doesn't end its unit meanwhile
        begun = {number for number, who in started_by(tmp_path).items() if victim.pid in who}
        killed_in.update(number for number in begun if not (tmp_path / f"{number}.digest").exists())
        if not killed_in:
            os.kill(victim.pid, signal.SIGCONT)
        return bool(killed_in)

    def kill_within_a_unit() -> None:
        wait_for(lambda: len(list(tmp_path.glob("*.digest"))) >= 6)
        wait_for(caught_within_a_unit)
        cluster.kill(victim)

    killer = threading.Thread(target=kill_within_a_unit)
    killer.start()
    with open_pool("dask", 2, cluster.address) as pool:
        found = list(pool.run_all(units.digest, ((tmp_path, i, 0.2, text) for i, text in enumerate(texts))))
    killer.join()
    expected = [hashlib.sha256(text).hexdigest() for text in texts]
    assert found == list(enumerate(expected))
    assert [(tmp_path / f"{number}.digest").read_text() for number in range(36)] == expected
    assert {len(started_by(tmp_path)[number]) for number in killed_in} == {2}  # another began them again
    assert not [warning for warning in recwarn if "large" in str(warning.message)]


def test_a_build_on_a_cluster_that_loses_a_worker_makes_the_same_bytes(cluster, tmp_path) -> None:
    victim, *_ = [cluster.add_worker("--no-nanny", "--nthreads", "2") for _ in range(2)]
    generator = np.random.default_rng(0)
    documents = [" ".join(map(str, generator.integers(0, 999, 500))) + "." for _ in range(10_000)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    config = DataConfig(
        [Source("text", str(tmp_path / "text.txt"))], "train", vocab_size=300, dupe_factor=2, rows_per_shard=9000
    )
    build(config, tmp_path / "processes")

    def kill() -> None:
        wait_for(lambda: list((tmp_path / "dask" / "work").glob("unit-*.npz")))
        cluster.kill(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    build(replace(config, executor="dask", scheduler=cluster.address), tmp_path / "dask")
    killer.join()
    files = [path.name for path in (tmp_path / "processes").glob("*.h5")] + ["manifest.json"]
    assert len(files) > 10
    for name in files:
        assert (tmp_path / "dask" / name).read_bytes() == (tmp_path / "processes" / name).read_bytes()


def endless_items(folder: Path, on_the_way: Callable[[], object]) -> Iterator[tuple]:
    """Short units for :func:`digest`; ``on_the_way`` is called after a few of them."""
    for number in range(10_000):
        if number == 6:
            on_the_way()
        yield folder, number, 0.1, b""


@pytest.mark.parametrize(
    ("unit", "line"),
    [("refuse", "row 1 is bad: mend it"), ("die", "several Dask workers died .* same command again, which continues")],
)
def test_a_dask_unit_that_fails_or_kills_its_workers_ends_in_one_line(cluster, units, unit, line) -> None:
    cluster.add_worker("--nthreads", "2")
    assert re.fullmatch(line, error_line("dask", cluster.address, getattr(units, unit), range(20)))


def test_a_lost_dask_scheduler_ends_in_one_line(cluster, units, tmp_path) -> None:
    cluster.add_worker("--no-nanny")
    items = endless_items(tmp_path, lambda: cluster.kill(cluster.scheduler))
    line = error_line("dask", cluster.address, units.digest, items)
    assert re.fullmatch("lost the Dask scheduler at .* same command again, which continues", line)


def test_a_dask_worker_without_this_project_is_refused(cluster, units) -> None:
    cluster.add_worker("--no-nanny", PYTHONPATH="")
    line = error_line("dask", cluster.address, units.refuse, [])
    assert re.search("can't run this project .*No module named 'data_prep'.* PYTHONPATH=/", line)


def other_library(folder: Path) -> None:
    """Let Python find another release of tokenizers in ``folder``."""
    information = folder / "tokenizers-0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.1\n")


def other_project(folder: Path) -> None:
    """Copy this project to ``folder``, and change a line."""
    for package in ("common", "data_prep"):
        shutil.copytree(ROOT / package, folder / package)
    with (folder / "data_prep" / "masking.py").open("a") as file:
        file.write("# another line\n")


@pytest.mark.parametrize(("make", "named"), [(other_library, r"tokenizers 0\.1"), (other_project, "project files")])
def test_a_dask_worker_that_would_make_other_bytes_is_refused(
    cluster, units, make, named, python_path, tmp_path
) -> None:
    make(tmp_path / "other")
    cluster.add_worker("--no-nanny", PYTHONPATH=f"{tmp_path / 'other'}{os.pathsep}{python_path}")
    line = error_line("dask", cluster.address, units.refuse, [])
    assert re.search(f" has {named}.*, this command has .*: start .* PYTHONPATH=/", line)


def test_such_a_dask_worker_that_joins_later_writes_nothing(cluster, units, python_path, tmp_path) -> None:
    other_library(tmp_path / "other")
    cluster.add_worker("--no-nanny")
    late: list[subprocess.Popen] = []

    def join() -> None:
        late.append(cluster.add_worker("--no-nanny", PYTHONPATH=f"{tmp_path / 'other'}{os.pathsep}{python_path}"))

    line = error_line("dask", cluster.address, units.digest, endless_items(tmp_path, join))
    assert " has tokenizers 0.1, " in line
    assert late[0].pid not in set.union(*started_by(tmp_path).values())


def test_a_dask_cluster_without_a_worker_is_told(cluster, units, monkeypatch) -> None:
    monkeypatch.setattr(executors, "_NO_WORKER_SECONDS", 0.2)
    assert "has had no worker for 0.2 seconds" in error_line("dask", cluster.address, units.refuse, [])


@pytest.mark.parametrize("address", [None, "", "cluster", "cluster:port"])
def test_a_dask_address_without_a_port_is_refused(address) -> None:
    with pytest.raises(UserError, match="--scheduler HOST:PORT"):
        open_pool("dask", 2, address)


@pytest.mark.parametrize("scheme", ["tcp", "pigeon"])
def test_a_dask_scheduler_that_does_not_answer_is_told(scheme, units, free_port, monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(executors, "_CONNECT_SECONDS", 0.5)
    address = f"{scheme}://127.0.0.1:{free_port}"
    assert f"no Dask scheduler answers at {address}" in error_line("dask", address, units.refuse, [])


def test_dask_that_is_not_installed_is_named_with_its_extra(units, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "needs the extra 'cluster'" in error_line("dask", "127.0.0.1:8786", units.refuse, [])
