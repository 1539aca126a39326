"""A search whose processes are killed at random moments ends as one that was left alone, and pays nothing twice."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from common.folders import check_folder
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source
from pretrain.config import PretrainConfig
from pretrain.search import _only_coordinator
from pretrain.search_config import SearchConfig
from tests.pretrain.killed_search import (
    CONFIG,
    SearchCommand,
    check_course,
    family,
    has_members,
    kill_session,
    outcome,
    read_starts,
    sessions,
    wait_until,
    weights,
)

NUM_KILLS = 20
VICTIMS = ["coordinator"] * 5 + ["runner"] * 5 + ["launcher"] * 4 + ["rank"] * 4 + ["all"] * 2
MOMENTS = ["training"] * 7 + ["validation"] * 3 + ["saving"] * 3 + ["pausing"] * 2 + ["closing"] * 2 + ["any"] * 3
LENGTHS = {"training": 1.0, "validation": 0.2, "saving": 0.05, "pausing": 0.2, "closing": 0.3, "any": 10.0}
"""Seconds; a kill comes at a random moment within."""
LEAVING_SECONDS = 90.0
"""For a run whose coordinator has died, on a machine that starts other runs meanwhile; half of it is torch's import."""
PATIENCE_SECONDS = 6.0
"""How long to wait for a phase once a run trains; a kill at whatever there is comes then."""
STARTING_SECONDS = 60.0
"""How long to wait until a run trains."""
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


class Witness:
    """Keeps what the storage has once told of a run, and what the run had done by then."""

    def __init__(self, search: SearchCommand) -> None:
        self._search = search
        self._seen: dict[tuple[str, str, int], int] = {}

    def look(self) -> Counter:
        """The number of runs in each state."""
        runs = self._search.runs()
        for run in runs:
            if run.state in ("paused", "dropped", "finished"):
                folder = self._search.folder / "runs" / run.name / "run"
                self._seen.setdefault((run.name, run.state, run.stretch), self._paid(folder, run.state))
        return Counter(run.state for run in runs)

    def check(self) -> None:
        """Nothing that was recorded has been paid again: no other start of what was over, nor another way to a rung."""
        for (name, state, stretch), paid in self._seen.items():
            folder = self._search.folder / "runs" / name / "run"
            assert self._paid(folder, state) == paid, f"run {name}, recorded as {state} in stretch {stretch}"

    @staticmethod
    def _paid(folder: Path, state: str) -> int:
        starts = read_starts(folder)
        if state != "paused":
            return len(starts)
        return sum(event.get("stopped_by") == "pause" for events in starts for event in events)


class Killer:
    """Chooses moments and victims, kills, and tells it."""

    def __init__(self, search: SearchCommand, chance: random.Random) -> None:
        self._search, self._chance = search, chance
        self._victims, self._moments = list(VICTIMS), list(MOMENTS)
        chance.shuffle(self._victims)
        chance.shuffle(self._moments)
        self.phases: list[str] = []
        self.victims: list[str] = []
        self.longest_leaving = 0.0

    def kill_one(self, witness: Witness) -> None:
        """At a random moment of the phase that is next in the deck, or of what is going on where it does not come."""
        moment, victim = self._moments.pop(), self._victims.pop()
        states = witness.look()
        if moment != "any":
            self._wait_for(moment)
        time.sleep(self._chance.uniform(0, LENGTHS[moment]))
        assert not self._search.is_over(), f"over after {len(self.victims)} kills: {self._search.log()}"
        run, phase, processes = self._choose(moment)
        victim, left = self._kill(victim, processes)
        self.phases.append(phase)
        self.victims.append(victim)
        self.longest_leaving = max(self.longest_leaving, left)
        search_is = ", ".join(f"{number} {state}" for state, number in states.items())
        print(f"kill {len(self.victims)}: the {victim}, {run} {phase}; {search_is}; {left:.1f} s to leave", flush=True)

    def tell(self) -> None:
        """What was hit, in all."""
        print(f"victims {dict(Counter(self.victims))}; phases {dict(Counter(self.phases))}")
        print(f"the runs of a dead coordinator had left after {self.longest_leaving:.1f} s at most")

    def check(self) -> None:
        """The moments were a mixture."""
        count = Counter(self.phases)
        assert set(self.victims) == set(VICTIMS)
        assert count["training"] >= 5
        assert len({"validation", "saving", "pausing", "closing"} & set(count)) >= 2
        assert count["starting"] + count["between runs"] <= NUM_KILLS // 2

    def _wait_for(self, moment: str) -> None:
        deadline, has_begun = time.monotonic() + STARTING_SECONDS, False
        while time.monotonic() < deadline and not self._search.is_over():
            phases = {phase for phase, _ in self._search.phases().values()}
            if moment in phases:
                return
            if phases - {"starting"} and not has_begun:
                deadline, has_begun = time.monotonic() + PATIENCE_SECONDS, True
            time.sleep(0.002)

    def _choose(self, moment: str) -> tuple[str, str, dict[str, int]]:
        """A run with its phase and its processes by kind: one in the wished phase, else any."""
        phases, families = self._search.phases(), {}
        for name, (_, rank) in phases.items():
            with suppress(ProcessLookupError):
                families[name] = family(rank)
        if not families:
            for name, kind, pid in self._search.members():
                families.setdefault(name, {})[kind] = pid
        if not families:
            return "no run", "between runs", {}
        wished = [name for name in families if name in phases and phases[name][0] == moment]
        name = self._chance.choice(wished or sorted(families))
        return f"run {name}", phases[name][0] if name in phases else "starting", families[name]

    def _kill(self, victim: str, processes: dict[str, int]) -> tuple[str, float]:
        """Who was killed, and the seconds until all runs of a dead coordinator had left."""
        if processes and victim in ("runner", "launcher", "rank"):
            victim = victim if victim in processes else self._chance.choice(sorted(processes))
            with suppress(ProcessLookupError):
                os.kill(processes[victim], signal.SIGKILL)
            return victim, 0.0
        self._search.kill()
        orphans = sessions([pid for _, _, pid in self._search.members()])
        if victim == "all":
            for session in orphans:
                kill_session(session)
        return victim if victim == "all" else "coordinator", self._start_again(orphans)

    def _start_again(self, orphans: set[int]) -> float:
        """At once, or when the orphans have left."""
        began, at_once = time.monotonic(), self._chance.random() < 0.5
        if at_once:
            self._search.start()
        wait_until(lambda: not any(map(has_members, orphans)), LEAVING_SECONDS, "orphaned runs to leave")
        left = time.monotonic() - began
        if not at_once:
            assert self._search.members() == []
            self._search.start()
        return left


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder whose validation takes a while."""
    folder = tmp_path_factory.mktemp("kills") / "data"
    source = Source("demo", megabytes=0.1)
    build(DataConfig([source], "train", vocab_size=800, max_seq_length=64, validation_fraction=0.2), folder)
    return folder


@contextmanager
def ended(*searches: SearchCommand) -> Iterator[None]:
    """Whatever happens, none of their processes stays."""
    try:
        yield
    finally:
        for search in searches:
            if search.process:
                search.kill()
            for session in sessions([pid for _, _, pid in search.members()]):
                kill_session(session)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> SearchCommand:
    search = SearchCommand(tmp_path_factory.mktemp("undisturbed") / "S", data, CONFIG)
    began = time.monotonic()
    with ended(search):
        search.start()
        search.finish(seconds=600)
    states = Counter(run.state for run in search.runs())
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {dict(states)}")
    assert set(states) == {"finished", "dropped"}
    return search


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_at_random_moments_change_nothing_and_nothing_is_paid_twice(undisturbed, data, tmp_path) -> None:
    """Kills before the first run do not count. With ``-s`` each is told with what was going on."""
    search, began = SearchCommand(tmp_path / "killed" / "S", data, CONFIG), time.monotonic()
    witness, killer = Witness(search), Killer(search, random.Random(7))
    with ended(search):
        search.start()
        wait_until(lambda: search.members() or search.is_over(), 60, "the first run")
        for _ in range(NUM_KILLS):
            killer.kill_one(witness)
        last_kill = time.monotonic()
        wait_until(lambda: witness.look() and search.is_over(), 900, "the end")
        search.finish(seconds=1)
    print(f"killed: {last_kill - began:.0f} s until the last kill, {time.monotonic() - began:.0f} s in all")
    killer.tell()
    both = list(zip(search.run_folders(), undisturbed.run_folders(), strict=True))
    print(f"steps destroyed in each run: {[check_course(*folders) for folders in both]}")
    witness.check()
    assert outcome(search) == outcome(undisturbed)
    assert weights(search) == weights(undisturbed)
    killer.check()


# --- several machines ---


@pytest.fixture
def postgresql(free_port) -> Iterator[str]:
    """The URL of an empty database, on a server of its own."""
    pytest.importorskip("psycopg")
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("needs PostgreSQL's initdb and pg_ctl in the path")
    folder = Path(tempfile.mkdtemp())
    user = "nobody" if os.getuid() == 0 else None  # PostgreSQL does not run as root
    if user:
        shutil.chown(folder, user)

    def run(*command: object) -> None:
        subprocess.run(list(map(str, command)), user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "-D", folder / "db", "-A", "trust", "-U", "me")
    options = f"-p {free_port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    run("pg_ctl", "-D", folder / "db", "-o", options, "-l", folder / "log", "-w", "start")
    yield f"postgresql://me@127.0.0.1:{free_port}/postgres"
    run("pg_ctl", "-D", folder / "db", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def machine(name: str, core: int) -> list[str]:
    """A command that runs another one as if on a machine of that name, with one core."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("may not give a process another host name")
    return ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec taskset -c {core} "$@"', "sh"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_machine_takes_over_what_another_one_that_died_has_begun(undisturbed, data, tmp_path, postgresql) -> None:
    """Both share the search's folder; the first is killed with its run, as by a power cut, and does not come back."""
    config = {**CONFIG, "storage": postgresql}
    cores = sorted(os.sched_getaffinity(0))
    folder = tmp_path / "shared" / "S"
    first, second = (
        SearchCommand(folder, data, config, machine(name, core))
        for name, core in zip(("one", "two"), cores, strict=False)
    )
    with ended(first, second):
        first.start()
        second.start()
        wait_until(lambda: any("one" in (run.place or "") and run.steps >= 25 for run in first.runs()), 200, "steps")
        (lost,) = (run for run in first.runs() if "one" in (run.place or ""))
        family_of_lost = sessions([pid for name, _, pid in first.members() if name == lost.name])
        first.kill()
        for session in family_of_lost:
            kill_session(session)
        began, starts = time.monotonic(), len(read_starts(folder / "runs" / lost.name / "run"))
        wait_until(lambda: first.runs()[lost.number].trial != lost.trial, 200, "the run to be given back")
        given_back = time.monotonic() - began
        second.finish(seconds=900)
    print(f"killed {lost.place} at step {lost.steps}; its run was given back after {given_back:.0f} s")
    assert given_back > 45, "not before its signs of life have been missed"
    assert len(read_starts(folder / "runs" / lost.name / "run")) > starts
    for folders in zip(second.run_folders(), undisturbed.run_folders(), strict=True):
        check_course(*folders)
    assert outcome(second) == outcome(undisturbed)
    assert weights(second) == weights(undisturbed)


def test_a_machine_that_has_just_begun_does_not_make_the_folder_pass_for_anothers(tmp_path) -> None:
    config = SearchConfig(PretrainConfig(), {"seed": [1, 2]}, storage="postgresql://me@host/search")
    with _only_coordinator(config, tmp_path / "S", config.storage):
        check_folder(tmp_path / "S", config)
