"""The budget is kept, whatever the steps do, and marks come when they are due."""

import math
import random

import pytest

from pretrain.budget import ACTIVITIES, Budget, Cadence, parse_duration, share_of_run


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("3d", 259200), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "h", "-3h", "0s", "3 weeks", "1h30m", ""])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_an_interval_is_a_share_of_the_run() -> None:
    assert share_of_run("10%", None) == 0.1
    assert share_of_run("30m", 24 * 3600) == pytest.approx(1 / 48)
    with pytest.raises(ValueError, match="max_steps"):
        share_of_run("30m", None)


@pytest.mark.parametrize("seed", range(20))
def test_no_run_overruns_by_more_than_the_jitter_of_a_step(seed: int) -> None:
    clock, generator = FakeClock(), random.Random(seed)
    budget = Budget(seconds=60.0, max_steps=None, clock=clock)
    budget.start(0)
    step = 0
    while budget.has_room_for(step):
        duration = generator.uniform(0.9, 1.1)
        clock.now += duration
        budget.record_step(duration)
        step += 1
    assert 60.0 - 2 * 1.1 < budget.elapsed() < 60.0 + 0.2


@pytest.mark.parametrize("seed", range(20))
def test_a_step_on_its_way_to_the_device_is_counted_before_the_next_one_is_queued(seed: int) -> None:
    """As on a GPU: when a step is decided on, the one before has only begun to run."""
    clock, generator = FakeClock(), random.Random(seed)
    budget = Budget(seconds=60.0, max_steps=None, steps_in_flight=1, clock=clock)
    budget.start(0)
    steps, running = 0, 0.0
    while budget.has_room_for(steps):
        clock.now += running  # until the step before has ended; this one begins
        budget.record_step(running)
        running = generator.uniform(0.9, 1.1)
        steps += 1
    clock.now += running
    assert 60.0 - 3 * 1.1 < budget.elapsed() < 60.0 + 0.4


def test_elapsed_time_continues_over_a_resume_and_time_between_runs_does_not_count() -> None:
    clock = FakeClock()
    budget = Budget(seconds=100.0, max_steps=None, spent_before={"training": 30.0, "starting": 10.0}, clock=clock)
    clock.now += 5000.0
    assert budget.elapsed() == 40.0
    budget.start(0)
    clock.now += 10.0
    assert budget.elapsed() == 50.0
    assert budget.progress(step=3) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_every_second_is_put_down_to_one_activity(seed: int) -> None:
    clock, generator = FakeClock(), random.Random(seed)
    budget = Budget(seconds=1e9, max_steps=None, spent_before={"compile": 2.0}, clock=clock)
    budget.start(0)
    expected = dict.fromkeys(ACTIVITIES, 0.0) | {"compile": 2.0}
    for _ in range(50):
        activity, seconds = generator.choice(ACTIVITIES), generator.uniform(0, 5)
        clock.now += seconds
        budget.charge(activity)
        expected[activity] += seconds
    clock.now += 3.0
    budget.stop()
    expected["training"] += 3.0
    clock.now += 7.0  # does not count any more
    assert budget.spent_seconds() == pytest.approx(expected)
    assert budget.elapsed() == pytest.approx(math.fsum(expected.values()))


def test_a_run_of_steps_has_the_same_interface() -> None:
    budget = Budget(seconds=None, max_steps=4)
    budget.start(0)
    assert [budget.progress(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [budget.progress_after(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [budget.has_room_for(step) for step in range(6)] == [True] * 4 + [False] * 2


def test_no_step_passes_a_pause_and_the_schedule_knows_nothing_of_it() -> None:
    clock = FakeClock()
    budget = Budget(seconds=100.0, max_steps=None, pause_at=0.5, clock=clock)
    budget.start(0)
    for _ in range(2):
        clock.now += 20.0
        budget.record_step(20.0)
    assert budget.elapsed() == 40.0
    assert not budget.has_room_for(2), "the third step would end at 60 s"
    assert budget.progress_after(2) == pytest.approx(0.6)


def test_progress_after_a_step_is_where_the_clock_will_stand() -> None:
    clock = FakeClock()
    budget = Budget(seconds=100.0, max_steps=None, clock=clock)
    budget.start(0)
    for seconds in (9.0, 2.0, 2.0, 20.0):  # the first one and the odd one tell nothing of the others
        clock.now += seconds
        budget.record_step(seconds)
    assert budget.progress_after(4) == pytest.approx((33.0 + 2.0) / 100.0)


def test_a_schedule_longer_than_the_run_ends_early() -> None:
    clock = FakeClock()
    budget = Budget(seconds=100.0, max_steps=None, schedule_scale=3.0, clock=clock)
    budget.start(0)
    clock.now += 50.0
    assert budget.progress(0) == 0.5
    assert budget.schedule_position(budget.progress(0)) == pytest.approx(1 / 6)


def marks(cadence: Cadence, steps: int) -> list[float]:
    found = []
    for step in range(steps + 1):
        progress = step / steps
        if cadence.is_due(progress):
            found.append(progress)
            cadence.skip_to(progress)
    return found


def test_marks_come_once_each_at_their_share() -> None:
    assert marks(Cadence(0.1), 1000) == pytest.approx([k / 10 for k in range(1, 11)])


def test_a_mark_of_its_own_comes_once_and_not_twice_where_a_regular_one_is() -> None:
    assert marks(Cadence(0.25, extra=[0.3]), 1000) == pytest.approx([0.25, 0.3, 0.5, 0.75, 1.0])
    assert marks(Cadence(0.1, extra=[0.3, 0.5]), 1000) == pytest.approx([k / 10 for k in range(1, 11)])


def test_marks_are_denser_in_the_early_part() -> None:
    paper = Cadence(interval=30 / 1440, early_interval=10 / 1440, early_share=0.05)
    minutes = [mark * 1440 for mark in marks(paper, 14_400)]
    assert minutes[:7] == pytest.approx([10, 20, 30, 40, 50, 60, 70], abs=0.2)
    assert minutes[7:9] == pytest.approx([72 + 30, 72 + 60], abs=0.2)


def test_a_resume_does_not_repeat_marks() -> None:
    cadence = Cadence(0.1)
    cadence.skip_to(0.55)
    assert not cadence.is_due(0.59)
    assert cadence.is_due(0.61)


def test_a_slow_first_step_does_not_end_the_run() -> None:
    clock = FakeClock()
    budget = Budget(seconds=150.0, max_steps=None, clock=clock)
    budget.start(0)
    clock.now += 80.0
    budget.record_step(80.0)  # compilation
    assert budget.has_room_for(1)
    clock.now += 1.0
    budget.record_step(1.0)
    assert budget.step_seconds == 1.0


def test_a_resume_near_the_end_knows_how_long_a_step_takes() -> None:
    budget = Budget(seconds=100.0, max_steps=None, spent_before={"training": 97.0}, durations={"step": 5.0})
    assert not budget.has_room_for(20)


@pytest.mark.parametrize(("left", "starts"), [(20.0, True), (14.0, False)])
def test_a_resume_that_could_not_make_a_step_leaves_the_rest_of_the_budget(left: float, starts: bool) -> None:
    """Starting takes 5 s and a start's first step 10."""
    clock = FakeClock()
    durations = {"starting": 5.0, "first_step": 10.0, "step": 1.0}
    budget = Budget(100.0, None, spent_before={"training": 100.0 - left}, durations=durations, clock=clock)
    budget.start(7)
    clock.now += 5.0
    budget.started()
    assert budget.has_room_for(7) == starts
    assert budget.elapsed() == 100.0 - left + (5.0 if starts else 0.0)


def test_what_a_start_has_learnt_is_told_to_the_next_one() -> None:
    clock = FakeClock()
    budget = Budget(100.0, None, spent_before={"starting": 50.0}, clock=clock)
    budget.start(0)
    clock.now += 3.0
    budget.charge("micro_batch_search")
    clock.now += 2.0
    budget.started()
    for seconds in (8.0, 1.0, 1.5):
        clock.now += seconds
        budget.record_step(seconds)
    assert budget.durations() == {"starting": 2.0, "first_step": 8.0, "step": 1.5}
