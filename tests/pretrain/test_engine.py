"""On a GPU a step is queued while the one before still runs. The device is played by a double: there is none here."""

import pytest
import torch

from pretrain.engine import PretrainEngine


@pytest.fixture
def device(monkeypatch) -> list[str]:
    """What the device was asked for, in order."""
    calls: list[str] = []
    events = iter("abcdef")

    class Event:
        def __init__(self) -> None:
            self.name = next(events)

        def record(self) -> None:
            calls.append(f"mark the end of step {self.name}")

        def synchronize(self) -> None:
            calls.append(f"wait for step {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return calls


def test_a_step_waits_for_the_one_before_it_and_only_then_tells_the_time(device) -> None:
    engine = PretrainEngine.__new__(PretrainEngine)
    engine._step_before = None
    assert [engine._wait_for_the_step_before() for _ in range(3)] == [False, True, True]
    assert engine.is_busy
    assert [engine.finish(), engine.finish()] == [True, False]
    assert not engine.is_busy
    assert engine._wait_for_the_step_before() is False, "an empty queue is filled, which takes no time"
    assert device == [
        "mark the end of step a",
        "mark the end of step b",
        "wait for step a",
        "mark the end of step c",
        "wait for step b",
        "wait for step c",
        "mark the end of step d",
    ]
