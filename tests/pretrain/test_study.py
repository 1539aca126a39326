"""The runs of a search in its storage: who runs next, who goes on at a rung, what a kill leaves, what is refused."""

import itertools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from common.errors import UserError
from common.storage import errors_of_storage
from pretrain.config import PretrainConfig
from pretrain.rungs import Rung
from pretrain.search_config import SearchConfig
from pretrain.search_runs import UNFINISHED, SearchRun
from pretrain.study import STUDY_NAME, SearchStore

REPOSITORY = Path(__file__).parents[2]
RATES = [1e-4, 2e-4, 3e-4, 4e-4]
CONFIG = SearchConfig(
    pretrain=PretrainConfig(time_budget="24h"),
    space={"optimizer.learning_rate": RATES},
    rungs=[Rung("3h", "below 6.0"), Rung("12h", "top 50 %")],
)
FINGERPRINT = {"data": "abc", "time_budget": "24h"}


def anywhere(_: SearchRun) -> bool:
    return True


def new_store(folder: Path, config: SearchConfig = CONFIG, **seconds: int) -> SearchStore:
    store = SearchStore(f"sqlite:///{folder / 'trials.db'}", config, **seconds)
    store.check(FINGERPRINT)
    store.open(FINGERPRINT, {"hardware": "a machine"})
    store.add_missing(nobody_runs=False)
    return store


def claim(store: SearchStore) -> SearchRun | None:
    return store.claim("here", time.time(), anywhere)


def states(store: SearchStore) -> list[str]:
    return [run.state for run in store.runs()]


def reach_rung(store: SearchStore, loss: float) -> SearchRun:
    run = claim(store)
    store.report(run, [(3600.0, 7.0), (43200.0, loss)], {"elapsed_seconds": 43_200.0, "steps": 10})
    assert store.pause(run, CONFIG.pauses[0], loss)
    store.decide()
    return run


def test_a_run_is_one_trial_from_its_first_start_to_its_end_with_its_curve(tmp_path) -> None:
    store = new_store(tmp_path)
    run = claim(store)
    assert (run.number, run.state, run.place) == (0, "running", "here")
    assert store.report(run, [(1800.4, 7.5), (3600.2, 7.0)], {"elapsed_seconds": 3600.2, "steps": 12, "starts": 1})
    assert store.give_back(run, kills=1)
    again = store.claim("here", time.time(), lambda run: run.number == 0)
    assert (again.number, again.starts, again.kills, again.steps) == (0, 1, 1, 12)
    assert again.curve == ((1800.4, 7.5), (3600.2, 7.0))
    assert store.end(again, "finished", None, 1.75)
    (study,) = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'trials.db'}")
    trials = optuna.load_study(study_name=study, storage=f"sqlite:///{tmp_path / 'trials.db'}").trials
    assert len(trials) == len(RATES)
    assert trials[0].intermediate_values == {1800: 7.5, 3600: 7.0}
    assert (trials[0].value, trials[0].params) == (1.75, {"optimizer.learning_rate": 1e-4})
    assert store.runs()[0].final_loss == 1.75


def test_the_better_half_goes_on_as_soon_as_it_is_certain_and_never_too_early(tmp_path) -> None:
    store = new_store(tmp_path)
    reach_rung(store, 3.0)
    assert states(store) == ["paused", "waiting", "waiting", "waiting"]
    reach_rung(store, 4.0)
    assert states(store) == ["paused", "paused", "waiting", "waiting"], "two more may still be better"
    reach_rung(store, 5.0)
    assert states(store) == ["waiting", "paused", "dropped", "waiting"], (
        "the first is among the best two of four whatever comes"
    )
    reach_rung(store, 3.5)
    assert states(store) == ["waiting", "dropped", "dropped", "waiting"]
    assert [run.stretch for run in store.runs()] == [1, 0, 0, 1]
    assert store.runs()[1].because == "validation loss 4.0000 at 12h is not among the top 50 %"


def test_runs_that_end_before_the_rung_leave_their_places_there_to_nobody(tmp_path) -> None:
    """Of the two that reach it one goes on, not two of four."""
    store = new_store(tmp_path)
    for state in ("diverged", "dropped"):
        store.end(claim(store), state, "because")
    reach_rung(store, 3.0)
    reach_rung(store, 2.0)
    assert states(store) == ["diverged", "dropped", "dropped", "waiting"]


def test_what_has_the_longest_way_to_go_runs_first(tmp_path) -> None:
    store = new_store(tmp_path)
    run = claim(store)
    store.report(run, [], {"elapsed_seconds": 600.0})
    store.give_back(run)
    assert [claim(store).number for _ in RATES] == [1, 2, 3, 0]
    assert claim(store) is None


def test_a_run_goes_on_only_where_it_can(tmp_path) -> None:
    store = new_store(tmp_path)
    taken = store.claim("here", 0.0, lambda run: run.number == 2)
    assert taken.number == 2
    assert store.claim("here", 0.0, lambda run: False) is None


def test_a_run_whose_machine_shows_no_sign_of_life_waits_again_with_all_that_is_known(tmp_path) -> None:
    store = new_store(tmp_path, heartbeat_seconds=1, stale_seconds=1)
    run = claim(store)
    store.report(run, [(60.0, 7.0)], {"elapsed_seconds": 60.0})
    other = claim(store)
    with store.heartbeat(other):
        time.sleep(2.6)
        store.give_back_stale()
    assert states(store) == ["waiting", "running", "waiting", "waiting"]
    assert store.runs()[0].curve == ((60.0, 7.0),)
    assert not store.report(run, [(90.0, 6.0)], {"elapsed_seconds": 90.0}), "it is somebody else's now"
    assert not store.end(run, "finished", None, 1.0)
    assert store.runs()[0].curve == ((60.0, 7.0),)


def test_the_next_start_tries_again_what_has_failed_and_what_a_dead_coordinator_has_left(tmp_path) -> None:
    store = new_store(tmp_path)
    store.end(claim(store), "failed", "no space left")
    claim(store)
    assert states(store) == ["failed", "running", "waiting", "waiting"]
    store.add_missing(nobody_runs=False)
    assert states(store) == ["waiting", "running", "waiting", "waiting"]
    store.add_missing(nobody_runs=True)
    assert states(store) == ["waiting"] * 4
    assert [run.number for run in store.runs()] == [0, 1, 2, 3]


def test_a_sampler_chooses_when_a_place_is_free_and_no_more_than_planned(tmp_path) -> None:
    config = replace(CONFIG, sampler="random", num_runs=3)
    store = new_store(tmp_path, config)
    assert store.runs() == []
    claimed = [claim(store) for _ in range(4)]
    assert claimed[3] is None
    rates = [run.parameters["optimizer.learning_rate"] for run in claimed[:3]]
    assert len(set(rates)) == 3
    assert set(rates) <= set(RATES)


def test_a_search_of_another_budget_is_refused_with_the_difference_and_nothing_written(tmp_path) -> None:
    new_store(tmp_path)
    before = (tmp_path / "trials.db").read_bytes()
    store = SearchStore(f"sqlite:///{tmp_path / 'trials.db'}", CONFIG)
    with pytest.raises(UserError, match=r"never mixes budgets.*data was abc, is xyz"):
        store.check({**FINGERPRINT, "data": "xyz"})
    assert (tmp_path / "trials.db").read_bytes() == before


def test_a_storage_of_something_else_is_refused(tmp_path) -> None:
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'trials.db'}", study_name="rte")
    with pytest.raises(UserError, match="study 'rte' of something else"):
        new_store(tmp_path)


MANY = replace(CONFIG, space={"seed": list(range(30))})


def take_all(folder: Path, taken: Any) -> None:
    store = SearchStore(f"sqlite:///{folder / 'trials.db'}", MANY)
    store.reopen()
    taken.put([run.number for run in iter(lambda: claim(store), None)])


def test_two_processes_never_take_the_same_run(tmp_path) -> None:
    store = new_store(tmp_path, MANY)
    context = multiprocessing.get_context("fork")  # spawned ones would import for ten seconds
    taken = context.Queue()
    workers = [context.Process(target=take_all, args=(tmp_path, taken)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(taken.get(timeout=60) + taken.get(timeout=60)) == list(range(30))
    for worker in workers:
        worker.join()
    assert all(run.state == "running" for run in store.runs())


def test_a_storage_that_fills_up_is_told_in_one_line(tmp_path) -> None:
    store = new_store(tmp_path)
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    run = claim(store)
    engine = store._storage.engine
    sqlalchemy.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
    store._storage.remove_session()
    engine.dispose()  # the next connection has no room
    with (
        pytest.raises(UserError, match=r"does not take what has to be recorded .*full.*same command"),
        errors_of_storage(url),
    ):
        store.report(run, [], {"because": "x" * 10_000_000})


def test_optuna_reads_the_study_with_its_own_tools(tmp_path) -> None:
    store = new_store(tmp_path)
    for loss in (2.0, 1.5, 1.75):
        run = claim(store)
        store.report(run, [(3600.0, 7.0)], {"elapsed_seconds": 86_400.0})
        store.end(run, "finished", None, loss)
    study = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{tmp_path / 'trials.db'}")
    assert study.best_value == 1.5
    assert study.best_params == {"optimizer.learning_rate": 2e-4}


# What a kill leaves


class KilledError(BaseException):
    """In place of SIGKILL."""


def kill_at(store: SearchStore, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a coordinator die before so manieth of its writes to the storage."""
    writes = iter(range(number))

    def wrapped(write: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any, **options: Any) -> Any:
            if next(writes, None) is None:
                raise KilledError
            return write(*arguments, **options)

        return one

    for name in ("create_new_study", "set_study_user_attr", "create_new_trial", "set_trial_user_attr"):
        monkeypatch.setattr(store._storage, name, wrapped(getattr(store._storage, name)))
    for name in ("set_trial_state_values", "set_trial_intermediate_value", "record_heartbeat"):
        monkeypatch.setattr(store._storage, name, wrapped(getattr(store._storage, name)))


def search_to_its_end(store: SearchStore) -> list[tuple]:
    """A search of runs whose losses follow from their number: by run, what the storage has of it in the end."""
    store.check(FINGERPRINT)
    store.open(FINGERPRINT, {"hardware": "a machine"})
    store.add_missing(nobody_runs=True)
    while any(run.state in UNFINISHED for run in store.runs()):
        store.decide()
        run = claim(store)
        if run and run.stretch == 0:
            store.report(run, [(43200.0, 3.0 + run.number)], {"elapsed_seconds": 43_200.0})
            store.pause(run, CONFIG.pauses[0], 3.0 + run.number)
        elif run:
            store.report(run, [(43200.0, 3.0 + run.number), (86400.0, 2.0)], {"elapsed_seconds": 86_400.0})
            store.end(run, "finished", None, 2.0 + run.number)
    return [(run.number, run.state, run.stretch, run.curve, run.rung_losses, run.final_loss) for run in store.runs()]


@pytest.mark.slow
def test_a_kill_before_any_write_to_the_storage_changes_nothing(tmp_path, monkeypatch) -> None:
    config = replace(CONFIG, space={"seed": [0, 1]})
    expected = search_to_its_end(SearchStore(f"sqlite:///{tmp_path / 'undisturbed.db'}", config))
    assert [state for _, state, *_ in expected] == ["finished", "dropped"]
    for number in itertools.count():
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        store = SearchStore(url, config)
        with monkeypatch.context() as patch:
            kill_at(store, number, patch)
            try:
                search_to_its_end(store)
            except KilledError:
                assert search_to_its_end(SearchStore(url, config)) == expected, f"after {number} writes"
                continue
        break
    assert number > 30
