"""SIGKILL of a coordinator between any two writes to its storage loses nothing and does nothing twice.

The runs are made up (:mod:`tests.pretrain.made_machine`); their storage and folders are real.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage

from tests.pretrain.made_machine import CONFIG, Killed, Machine, MadeSearch


def killed_after(writes: int, monkeypatch) -> None:
    """The process dies when it has written to the storage so often."""
    left = [writes]

    def counted(write: Callable) -> Callable:
        def attempt(*arguments: Any, **named: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return write(*arguments, **named)

        return attempt

    for name in ("set_trial_user_attr", "set_trial_state_values", "set_trial_intermediate_value", "create_new_trial"):
        monkeypatch.setattr(RDBStorage, name, counted(getattr(RDBStorage, name)))


def result(made: MadeSearch) -> list[dict[str, Any]]:
    told = (
        "parameters",
        "state",
        "because",
        "curve",
        "steps",
        "sequences",
        "elapsed_seconds",
        "rung_losses",
        "final_loss",
    )
    return [{name: getattr(run, name) for name in told} for run in made.store.runs()]


def killed_and_done(folder: Path, writes: int) -> tuple[MadeSearch, bool]:
    """A search whose coordinator is killed after so many writes, and which goes on; and whether it was killed."""
    folder.mkdir()
    made = MadeSearch(CONFIG, folder, Machine())
    with pytest.MonkeyPatch.context() as monkeypatch:
        killed_after(writes, monkeypatch)
        try:
            made.run(monkeypatch)
        except Killed:
            was_killed = True
        else:
            was_killed = False
    made.machine.coordinator_is_gone()
    made.store = made.open()
    with pytest.MonkeyPatch.context() as monkeypatch:
        made.run(monkeypatch)
    return made, was_killed


def check_kills(tmp_path: Path, moments: Iterator[int]) -> int:
    """How many of the kills came before the end of the search."""
    undisturbed, _ = killed_and_done(tmp_path / "undisturbed", 10**6)
    num_killed = 0
    for writes in moments:
        print(f"killed after {writes} writes")
        made, was_killed = killed_and_done(tmp_path / f"{writes}", writes)
        assert result(made) == result(undisturbed)
        trained = sum(launch.step - launch.first_step for launch in made.machine.launches)
        assert trained == 8 + 4 + 16 + 16, "nothing is done twice"
        num_killed += was_killed
        if not was_killed:
            break
    return num_killed


def test_a_coordinator_killed_between_two_writes_loses_nothing(tmp_path) -> None:
    assert check_kills(tmp_path, iter([14, 38])) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_coordinator_killed_between_any_two_writes_loses_nothing(tmp_path) -> None:
    assert check_kills(tmp_path, iter(range(1000))) > 100
