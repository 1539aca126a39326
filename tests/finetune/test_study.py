from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.folders import file_lock
from finetune.study import MAX_ATTEMPTS, TrialStore
from finetune.trial import Cell

CELLS = [Cell("rte", rate, 32, 3, "pretrained", seed) for rate in (1e-5, 3e-5) for seed in (1, 2, 3)]
FINGERPRINT = {"model weights": "abc", "task data": "def", "weight_decay": 0.1}
RESULT = {"score": 0.5, "epochs": []}


def open_store(folder: Path) -> TrialStore:
    return TrialStore(f"sqlite:///{folder / 'trials.db'}", folder / "claim.lock")


@pytest.fixture
def store(tmp_path: Path) -> TrialStore:
    store = open_store(tmp_path)
    store.open_study("rte", FINGERPRINT, {"model": "hf", "rows": {}})
    store.enqueue_missing("rte", CELLS)
    return store


def test_workers_that_claim_at_once_never_get_the_same_trial(store: TrialStore, tmp_path: Path):
    store.enqueue_missing("rte", [replace(CELLS[0], seed=seed) for seed in range(100, 130)])

    def claim_all(worker: int) -> list[int]:
        mine = open_store(tmp_path)
        return [claimed.number for claimed in iter(lambda: mine.claim(["rte"], f"worker {worker}"), None)]

    with ThreadPoolExecutor(4) as pool:
        claimed = [number for numbers in pool.map(claim_all, range(4)) for number in numbers]
    assert sorted(claimed) == list(range(len(CELLS) + 30))


def test_trials_are_claimed_in_the_grids_order_and_results_come_back_whole(store: TrialStore):
    cells = []
    while claimed := store.claim(["rte"], "worker 0"):
        cells.append(claimed.cell)
        store.finish(claimed, {**RESULT, "seed was": claimed.cell.seed})
    assert cells == CELLS
    assert store.results("rte") == {cell: {**RESULT, "seed was": cell.seed} for cell in CELLS}


def test_nothing_waiting_running_or_finished_is_enqueued_again(store: TrialStore):
    store.finish(store.claim(["rte"], "worker 0"), RESULT)
    store.claim(["rte"], "worker 0")
    store.enqueue_missing("rte", CELLS)
    assert store.num_trials(["rte"]) == (1, len(CELLS) - 1)


def test_what_a_killed_run_left_running_is_run_again_and_counts_as_no_failure(store: TrialStore, tmp_path: Path):
    interrupted = store.claim(["rte"], "worker 0").cell
    after_kill = open_store(tmp_path)
    after_kill.give_back_interrupted("rte")
    after_kill.enqueue_missing("rte", CELLS)
    assert after_kill.failures("rte") == []
    remaining = [claimed.cell for claimed in iter(lambda: after_kill.claim(["rte"], "worker 0"), None)]
    assert sorted(remaining, key=str) == sorted(CELLS, key=str)
    assert interrupted in remaining


def test_a_failing_cell_is_tried_twice_in_a_run_and_again_in_the_next(store: TrialStore):
    def fail_all() -> int:
        attempts = 0
        while claimed := store.claim(["rte"], "worker 0"):
            if claimed.cell == CELLS[0]:
                attempts += 1
                store.fail(claimed, f"cause {attempts}")
            else:
                store.finish(claimed, RESULT)
        return attempts

    assert fail_all() == MAX_ATTEMPTS == 2
    assert store.failures("rte") == [(CELLS[0], "cause 1"), (CELLS[0], "cause 2")]
    store.enqueue_missing("rte", CELLS)
    assert fail_all() == 2


def test_a_dead_workers_trial_fails_with_its_cause_and_is_tried_again(store: TrialStore):
    lost, other = store.claim(["rte"], "worker 0"), store.claim(["rte"], "worker 1")
    assert store.fail_trials_of("worker 0", ["rte"], "exit code -9") == 1
    assert store.failures("rte") == [(lost.cell, "exit code -9")]
    waiting = [claimed.cell for claimed in iter(lambda: store.claim(["rte"], "worker 2"), None)]
    assert lost.cell in waiting
    assert other.cell not in waiting


def test_a_study_of_something_else_is_refused_with_the_difference_named(store: TrialStore, tmp_path: Path):
    other = {**FINGERPRINT, "model weights": "xyz"}
    with pytest.raises(UserError, match=r"rte were run with another model weights: give another --output_dir"):
        open_store(tmp_path).open_study("rte", other, {})
    open_store(tmp_path).open_study("rte", FINGERPRINT, {})


def test_a_storage_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "text.db").write_text("not a database, but a text that is long enough to be read as one" * 10)
    for url in ("nonsense", f"sqlite:///{tmp_path / 'text.db'}", f"sqlite:///{tmp_path / 'no' / 'folder.db'}"):
        with pytest.raises(UserError) as refusal:
            TrialStore(url, tmp_path / "claim.lock")
        assert "\n" not in str(refusal.value)


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path: Path):
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", blocking=False):
        pass
    with file_lock(tmp_path / "lock", blocking=False):
        pass
