"""A coordinator uses its places, keeps the rules of the rungs, and comes through what may happen to runs and to itself.

The runs are made up (:mod:`tests.pretrain.made_machine`); their storage and folders are real.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from common.errors import UserError
from common.folders import file_lock
from pretrain import study
from pretrain.coordinator import MAX_FAILURES
from pretrain.rungs import Rung
from pretrain.search_config import Hyperband, SearchConfig
from tests.pretrain.made_machine import (
    AS_THE_RULES_SAY,
    CONFIG,
    INTERVAL,
    KILLED,
    NO_ROOM,
    RUN_SECONDS,
    Fate,
    Killed,
    Machine,
    MadeSearch,
)

NO_RUNGS = replace(CONFIG, rungs=[])
CRASH = Fate(1, 1, "RuntimeError: out of luck\n")

Begin = Callable[..., MadeSearch]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """A search that may begin: its configuration, the fates of its runs, the number of its places."""

    def make(config: SearchConfig = CONFIG, fates: dict[int, Any] | None = None, num_places: int = 2) -> MadeSearch:
        return MadeSearch(config, tmp_path, Machine(fates), num_places)

    return make


# --- what runs when ---


def test_runs_pause_at_the_rung_and_the_best_half_goes_on_from_there(begin: Begin, monkeypatch) -> None:
    made = begin()
    assert made.run(monkeypatch) is None
    assert made.states() == AS_THE_RULES_SAY
    starts = [
        [(launch.first_step, launch.step, launch.config.pause_at) for launch in made.machine.of(n)] for n in range(4)
    ]
    to_rung, from_rung = (0, 8, "50%"), (8, 16, None)
    assert starts == [[to_rung], [(0, 4, "50%")], [to_rung, from_rung], [to_rung, from_rung]]
    worse, early, best, second = made.store.runs()
    assert "not among the top 50 %" in worse.because
    assert "after 25%, not to 6.5" in early.because
    assert (best.final_loss, second.final_loss) == (pytest.approx(2.1), pytest.approx(2.2))
    assert (best.steps, best.elapsed_seconds, best.starts) == (RUN_SECONDS, RUN_SECONDS, 2)
    assert [position for position, _ in best.curve] == list(range(INTERVAL, RUN_SECONDS + 1, INTERVAL))
    assert best.launch_seconds == pytest.approx(RUN_SECONDS, abs=1.0)


def test_no_place_idles_while_a_run_waits(begin: Begin, monkeypatch) -> None:
    made = begin(num_places=3)
    idle = []

    def look() -> None:
        if len(made.machine.living()) < 3:
            idle.extend(run.number for run in made.store.runs() if run.state == "waiting")

    made.machine.always.append(look)
    made.run(monkeypatch)
    assert made.states() == AS_THE_RULES_SAY
    assert idle == []


def test_the_longest_way_to_go_comes_first(begin: Begin, monkeypatch) -> None:
    """A run that has been promoted lets those that have not begun go before it."""
    made = begin(replace(CONFIG, space={"seed": [1, 2, 3, 4]}, rungs=[Rung("50%", "top 50 %")]), num_places=1)
    promoted = []
    made.machine.always.append(
        lambda: promoted.append(len(made.machine.launches)) if made.store.runs()[0].stretch else 0
    )
    made.run(monkeypatch)
    assert min(promoted) < 6, "known before all have begun"
    assert [launch.number for launch in made.machine.launches] == [0, 1, 2, 3, 0, 1]


def test_hyperband_ends_runs_that_do_badly_and_never_starts_them_again(begin: Begin, monkeypatch) -> None:
    seeds = {"seed": [1, 2, 10, 11, 12, 13, 14, 15]}
    made = begin(replace(NO_RUNGS, space=seeds, hyperband=Hyperband("12.5%", 2)))
    made.run(monkeypatch)
    dropped = [run for run in made.store.runs() if run.state == "dropped"]
    assert len(dropped) >= 2
    assert made.states()[0] == "finished"
    for run in dropped:
        (launch,) = made.machine.of(run.number)
        assert launch.asked
        assert launch.step < RUN_SECONDS
        assert "not among the best that Hyperband lets go on" in run.because


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_diverges_is_ended_at_once_and_only_checkpoints_of_dropped_runs_are_removed(
    begin: Begin, monkeypatch, kept: bool
) -> None:
    fates = {2: [Fate(3, 2, "the loss is not finite", diverged=True)]}
    made = begin(replace(CONFIG, keep_dropped_checkpoints=kept), fates)
    made.run(monkeypatch)
    there = [(made.runs_dir / run.name / "run" / "checkpoints").exists() for run in made.store.runs()]
    assert made.states() == ["dropped", "dropped", "diverged", "finished"]
    assert there == [kept, kept, True, True]
    assert made.store.runs()[2].because == "the loss is not finite"
    assert len(made.machine.of(2)) == 1


# --- runs that fail ---


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(begin: Begin, monkeypatch) -> None:
    made = begin(fates={2: [Fate(3, KILLED), Fate(5, KILLED)], 0: [Fate(1, KILLED)]})
    made.run(monkeypatch)
    assert made.states() == AS_THE_RULES_SAY
    assert [launch.first_step for launch in made.machine.of(2)] == [0, 2, 6, 8]
    assert [launch.first_step for launch in made.machine.of(0)] == [0, 0]
    assert made.store.runs()[2].lost_seconds == 2.0
    assert made.store.runs()[2].starts == 4


def test_a_run_that_is_killed_again_and_again_fails_only_if_it_comes_no_further(begin: Begin, monkeypatch) -> None:
    nowhere, further = [Fate(1, KILLED)] * 50, [Fate(3, KILLED), *[Fate(1, KILLED)] * 3] * 4
    made = begin(NO_RUNGS, {0: nowhere, 2: further})
    made.run(monkeypatch)
    assert made.states() == ["failed", "finished", "finished", "finished"]
    assert len(made.machine.of(0)) == 10
    assert len(made.machine.of(2)) == 17


def test_a_run_with_an_error_is_tried_once_more_then_fails_with_its_cause(begin: Begin, monkeypatch) -> None:
    made = begin(NO_RUNGS, {0: [CRASH, CRASH], 2: [CRASH]})
    made.run(monkeypatch)
    assert made.states() == ["failed", "finished", "finished", "finished"]
    assert made.store.runs()[0].because == "RuntimeError: out of luck"
    made.run(monkeypatch)  # the same command tries again what has failed
    assert made.states() == ["finished"] * 4
    assert [len(made.machine.of(number)) for number in range(4)] == [3, 1, 2, 1]


def test_failures_of_one_run_after_the_other_end_the_search_with_the_rest_waiting(begin: Begin, monkeypatch) -> None:
    space = {"seed": list(range(6))}
    made = begin(replace(NO_RUNGS, space=space), {number: [CRASH, CRASH] for number in range(6)}, num_places=1)
    with pytest.raises(UserError, match=r"3 runs in a row have failed, the last one \(002\) with: RuntimeError"):
        made.run(monkeypatch)
    assert made.states() == ["failed"] * MAX_FAILURES + ["waiting"] * 3


def test_failures_with_a_run_that_ends_well_between_them_do_not_end_the_search(begin: Begin, monkeypatch) -> None:
    space = {"seed": list(range(6))}
    made = begin(replace(NO_RUNGS, space=space), {number: [CRASH, CRASH] for number in (0, 1, 3, 4)}, num_places=1)
    assert made.run(monkeypatch) is None
    assert made.states() == ["failed", "failed", "finished", "failed", "failed", "finished"]


def test_a_full_disk_ends_the_search_in_one_line_and_loses_no_run(begin: Begin, monkeypatch) -> None:
    made = begin(fates={0: [Fate(3, 2, NO_ROOM)]})
    with pytest.raises(UserError, match=r"^run 000: can't write to /data \(No space left on device\): mend that$"):
        made.run(monkeypatch)
    assert made.states() == ["waiting"] * 4
    assert made.machine.of(1)[0].cause == "stopped by SIGTERM"
    made.run(monkeypatch)
    assert made.states() == AS_THE_RULES_SAY
    assert made.machine.of(0)[1].first_step == 2


# --- the coordinator's own end ---


def test_a_coordinator_that_is_asked_to_leave_saves_all_runs_and_another_goes_on(begin: Begin, monkeypatch) -> None:
    made = begin()
    made.machine.at[6.5] = lambda: setattr(made.asked, "reason", "SIGTERM")
    assert made.run(monkeypatch) == "SIGTERM"
    assert made.machine.living() == []
    assert all(launch.asked for launch in made.machine.launches if launch.cause == "stopped by SIGTERM")
    assert "running" not in made.states()
    made.asked.reason = None
    assert made.run(monkeypatch) is None
    assert made.states() == AS_THE_RULES_SAY
    assert [launch.first_step for launch in made.machine.of(0)][:2] == [0, 6], "nothing is done twice"


def test_an_allocation_that_ends_takes_the_coordinator_with_its_runs(begin: Begin, monkeypatch) -> None:
    made = begin()
    made.machine.at[3.5] = lambda: made.machine.living()[0].leave("slurm_end")
    assert made.run(monkeypatch) == "slurm_end"
    assert sorted(made.states()) == ["waiting"] * 4


def test_a_run_that_ended_while_no_coordinator_lived_is_recorded_whole_without_a_start(
    begin: Begin, monkeypatch
) -> None:
    made = begin(NO_RUNGS, num_places=4)

    def die() -> None:
        raise Killed

    made.machine.at[RUN_SECONDS - 3.5] = die
    with pytest.raises(Killed):
        made.run(monkeypatch)
    for launch in made.machine.living():
        launch.asked = False  # it comes to its end before it hears of it
    while made.machine.living():
        made.machine.sleep(1.0)
    assert made.store.runs()[0].steps < RUN_SECONDS
    made.run(monkeypatch)
    assert made.states() == ["finished"] * 4
    assert len(made.machine.launches) == 4
    for run in made.store.runs():
        assert (run.steps, run.sequences, run.curve[-1][0]) == (RUN_SECONDS, 4 * RUN_SECONDS, RUN_SECONDS)


# --- others in the same place ---


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[MadeSearch, str, str], Callable[[], None]]]:
    """Have a process of a host at work in the folder of a run; calling what it returns ends that."""
    with ExitStack() as held:

        def begin_work(made: MadeSearch, run: str, host: str) -> Callable[[], None]:
            folder = made.runs_dir / run / "run"
            folder.mkdir(parents=True)
            lock = ExitStack()
            lock.enter_context(file_lock(folder / ".lock"))
            (folder / ".lock").write_text(f"process 1 on {host}")
            held.callback(lock.close)
            return lock.close

        yield begin_work


def test_a_run_that_another_machine_still_holds_is_left_alone_until_it_leaves(begin: Begin, monkeypatch, hold) -> None:
    made = begin(num_places=4)
    made.machine.at[10.0] = hold(made, "000", "another-machine")
    made.run(monkeypatch)
    assert made.states() == AS_THE_RULES_SAY
    assert [launch.begun < 10.0 for launch in (made.machine.of(number)[0] for number in range(4))] == [
        False,
        *[True] * 3,
    ]


def test_no_run_starts_before_what_a_killed_coordinator_left_behind_has_left(begin: Begin, monkeypatch, hold) -> None:
    made = begin()
    made.machine.at[30.0] = hold(made, "001", socket.gethostname())
    made.run(monkeypatch)
    assert made.states() == AS_THE_RULES_SAY
    assert min(launch.begun for launch in made.machine.launches) >= 30.0


def test_what_never_leaves_is_named(begin: Begin, monkeypatch, hold) -> None:
    made = begin()
    hold(made, "001", socket.gethostname())
    with pytest.raises(UserError, match=f"process 1 on {socket.gethostname()} is still at work in .*: end it"):
        made.run(monkeypatch)
    assert made.machine.launches == []


def test_a_run_that_another_machine_has_taken_over_is_let_go(begin: Begin, monkeypatch) -> None:
    made = begin(NO_RUNGS, num_places=4)
    other = made.open()

    def take_over() -> None:
        """As the other's look does when this machine has given no sign of life for too long."""
        theirs = optuna.load_study(study_name=study.STUDY_NAME, storage=other._storage)
        trial = theirs.get_trials()[0]
        other._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        study._wait_anew(theirs, trial)
        taken = other.claim("there", 0.0, lambda run: run.number == 0)
        made.machine.at[30.0] = lambda: other.end(taken, "finished", None, 1.0)

    made.machine.at[3.5] = take_over
    assert made.run(monkeypatch) is None
    assert made.machine.now >= 30.0, "the search is not over before the other's run is"
    (launch,) = made.machine.of(0)
    assert launch.asked
    assert launch.step < 8
    assert [run.final_loss for run in made.store.runs()] == [1.0, *map(pytest.approx, (5.0, 2.1, 2.2))]


# --- between two starts ---


def test_fewer_runs_than_there_are_would_make_the_rungs_unfair_and_are_refused(tmp_path, monkeypatch) -> None:
    config = replace(CONFIG, sampler="random", num_runs=4, space={"seed": [1, 2, 3, 4]})
    made = MadeSearch(config, tmp_path, Machine(), num_places=4)
    made.machine.at[5.5] = lambda: setattr(made.asked, "reason", "SIGTERM")
    assert made.run(monkeypatch) == "SIGTERM"
    with pytest.raises(UserError, match="num_runs 1 is less than the 4 that there are"):
        MadeSearch(replace(config, num_runs=1), tmp_path, made.machine)


def test_a_run_whose_folder_is_gone_begins_anew(begin: Begin, monkeypatch) -> None:
    made = begin()
    made.machine.at[5.5] = lambda: setattr(made.asked, "reason", "SIGTERM")
    made.run(monkeypatch)
    made.asked.reason = None
    (made.runs_dir / "000").rename(made.folder / "elsewhere")
    made.machine.at[1000.0] = lambda: pytest.fail("it waits for ever")
    assert made.run(monkeypatch) is None
    assert made.states() == AS_THE_RULES_SAY
    assert [(launch.first_step, launch.step) for launch in made.machine.of(0)] == [(0, 5), (0, 8)]
