import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import optuna
import pytest

from common.errors import UserError
from common.folders import file_lock
from finetune.progress import look
from finetune.study import MAX_ATTEMPTS, Attempt, TrialStore
from finetune.tasks import TASKS
from finetune.trial import Cell

CELLS = [Cell("rte", rate, 32, 3, "pretrained", seed) for rate in (1e-5, 3e-5) for seed in (1, 2, 3)]
FINGERPRINT = {"model weights": "abc", "task data": "def", "weight_decay": 0.1}
RESULT = {"score": 0.5, "epochs": []}


def open_store(folder: Path, **seconds: int) -> TrialStore:
    return TrialStore(f"sqlite:///{folder / 'trials.db'}", **seconds)


def equal(cells: Iterable[Cell]) -> dict[Cell, float]:
    """The same priority for all."""
    return dict.fromkeys(cells, 1.0)


def claim_all(store: TrialStore, worker: str = "worker 0") -> list[Attempt]:
    return list(iter(lambda: store.claim(["rte"], worker), None))


def waiting(store: TrialStore) -> list[Cell]:
    return [attempt.cell for attempt in store.waiting(["rte"])]


@pytest.fixture
def store(tmp_path: Path) -> TrialStore:
    store = open_store(tmp_path)
    store.open_study("rte", FINGERPRINT, {"model": "hf", "rows": {}})
    store.enqueue_missing("rte", equal(CELLS))
    return store


def test_workers_that_claim_at_once_never_get_the_same_trial(store: TrialStore, tmp_path: Path):
    store.enqueue_missing("rte", equal(replace(CELLS[0], seed=seed) for seed in range(100, 130)))

    def claim_numbers(worker: int) -> list[int]:
        return [attempt.number for attempt in claim_all(open_store(tmp_path), f"worker {worker}")]

    with ThreadPoolExecutor(4) as pool:
        claimed = [number for numbers in pool.map(claim_numbers, range(4)) for number in numbers]
    assert sorted(claimed) == list(range(len(CELLS) + 30))


def test_the_highest_priority_is_claimed_first_and_the_grids_order_among_equals(store: TrialStore):
    dear = [replace(CELLS[0], num_epochs=10, seed=seed) for seed in (1, 2)]
    store.enqueue_missing("rte", dict.fromkeys(dear, 3.0))
    assert [attempt.cell for attempt in claim_all(store)] == dear + CELLS


def test_what_may_not_run_yet_is_left_waiting(store: TrialStore):
    attempt = store.claim(["rte"], "worker 0", lambda cell: cell.seed == 2)
    assert attempt.cell.seed == 2
    assert len(waiting(store)) == len(CELLS) - 1


def test_results_come_back_whole(store: TrialStore):
    for attempt in claim_all(store):
        assert store.finish(attempt, {**RESULT, "seed was": attempt.cell.seed})
    assert store.results("rte") == {cell: {**RESULT, "seed was": cell.seed} for cell in CELLS}


def test_nothing_waiting_running_or_finished_is_enqueued_again(store: TrialStore):
    store.finish(store.claim(["rte"], "worker 0"), RESULT)
    store.claim(["rte"], "worker 0")
    store.enqueue_missing("rte", equal(CELLS))
    assert (len(store.results("rte")), len(store.running(["rte"])), len(waiting(store))) == (1, 1, len(CELLS) - 2)


def test_a_trial_whose_worker_was_killed_waits_again_and_counts_as_no_failure(store: TrialStore):
    interrupted = store.claim(["rte"], "worker 0")
    (running,) = store.running_of("worker 0", ["rte"])
    store.give_back(running, kills=1)
    assert store.failures("rte") == []
    assert sorted(waiting(store), key=str) == sorted(CELLS, key=str)
    again = next(attempt for attempt in claim_all(store) if attempt.cell == interrupted.cell)
    assert (again.attempt, again.kills) == (1, 1)


def test_a_trial_without_sign_of_life_is_given_back_and_its_late_result_is_dropped(tmp_path: Path):
    store = open_store(tmp_path, heartbeat_seconds=1, stale_seconds=2)
    store.open_study("rte", FINGERPRINT, {})
    store.enqueue_missing("rte", equal(CELLS[:2]))
    silent, alive = store.claim(["rte"], "machine 1"), store.claim(["rte"], "machine 2")
    with store.heartbeat(alive):
        time.sleep(4.1)
        store.give_back_stale(["rte"])
    assert [attempt.cell for attempt in store.running(["rte"])] == [alive.cell]
    assert waiting(store) == [silent.cell]
    assert not store.finish(silent, RESULT)
    assert store.finish(alive, RESULT)
    assert store.results("rte").keys() == {alive.cell}
    assert store.failures("rte") == []


def test_a_failing_cell_is_tried_twice_in_a_run_and_again_in_the_next(store: TrialStore):
    def fail_all() -> int:
        attempts = 0
        while attempt := store.claim(["rte"], "worker 0"):
            if attempt.cell == CELLS[0]:
                attempts += 1
                store.fail(attempt, f"cause {attempts}")
            else:
                store.finish(attempt, RESULT)
        return attempts

    assert fail_all() == MAX_ATTEMPTS == 2
    assert store.failures("rte") == [(CELLS[0], "cause 1"), (CELLS[0], "cause 2")]
    store.enqueue_missing("rte", equal(CELLS))
    assert fail_all() == 2


def test_a_storage_of_something_else_is_refused_with_the_difference_named(store: TrialStore, tmp_path: Path):
    other = {**FINGERPRINT, "model weights": "xyz"}
    with pytest.raises(UserError, match=r"rte were run with another model weights: give another --output_dir"):
        open_store(tmp_path).check_studies({"rte": other, "cola": FINGERPRINT})
    with pytest.raises(UserError, match="'rte' of something else"):
        open_store(tmp_path).check_studies({"cola": FINGERPRINT})
    open_store(tmp_path).check_studies({"rte": FINGERPRINT, "cola": other})


def test_another_programs_study_is_refused_and_left_alone(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    study = optuna.create_study(storage=url, study_name="rte")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UserError, match="'rte' of something else"):
        TrialStore(url).check_studies({"rte": FINGERPRINT})
    assert optuna.load_study(storage=url, study_name="rte").user_attrs == {}


def test_stores_that_are_opened_at_once_make_one_storage(tmp_path: Path):
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: open_store(tmp_path), range(6)))
    assert [store.task_names() for store in stores] == [[]] * 6


def test_a_storage_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "text.db").write_text("not a database, but a text that is long enough to be read as one" * 10)
    for url in (
        "nonsense",
        "sqlite:///:memory:",
        "mysql://host/grid",
        f"sqlite:///{tmp_path / 'text.db'}",
        f"sqlite:///{tmp_path / 'no' / 'folder.db'}",
    ):
        with pytest.raises(UserError) as refusal:
            TrialStore(url)
        assert "\n" not in str(refusal.value)


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path: Path):
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", blocking=False):
        pass
    with file_lock(tmp_path / "lock", blocking=False):
        pass


def test_a_running_trial_tells_how_far_it_is_and_what_is_left_follows_from_it(store: TrialStore):
    """Two of six trials run: one that is half done after ten minutes, one that is to begin."""
    store.open_study("rte", FINGERPRINT, {"num_tokens": {"train": 100, "dev": 10}})
    half_done, _ = (store.claim(["rte"], f"worker {number}") for number in range(2))
    store.tell_share(half_done, 0.5)
    running = store.running(["rte"])
    assert [attempt.share for attempt in running] == [0.5, 0.0]
    early = {"rte": [replace(attempt, started=attempt.started - timedelta(minutes=10)) for attempt in running]}
    store.running = lambda task_names: [attempt for name in task_names for attempt in early[name]]
    progress = look(store, TASKS, {"rte": CELLS})
    assert progress.seconds_left == pytest.approx((0.5 + 5) * 20 * 60 / 2, rel=0.01)
    assert progress.line().startswith("0 of 6 trials done, 2 running (50%), 55 min left")


def test_what_a_trial_tells_when_it_is_no_longer_its_own_is_dropped(store: TrialStore):
    attempt = store.claim(["rte"], "worker 0")
    store.give_back(attempt)
    store.tell_share(attempt, 0.5)
    assert len(store.waiting(["rte"])) == len(CELLS)
