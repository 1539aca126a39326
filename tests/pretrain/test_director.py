"""All ranks take the same decisions at every step, whatever their clocks say, and leave together."""

import json

import pytest

from pretrain.budget import Budget, Cadence
from pretrain.director import Decision, Director
from pretrain.interruptions import INTERRUPTIONS


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def alone(budget: Budget, **options) -> Director:
    """A director of one rank."""
    settings = {
        "validation": Cadence(0.1),
        "saving": Cadence(0.25),
        "export_marks": {},
        "pending": lambda: None,
        "durations": {},
        "agree": lambda *values: [float(value) for value in values],
        "rank": 0,
    }
    return Director(budget, **{**settings, **options})


def decisions_of_a_run(director: Director, clock: FakeClock, budget: Budget, seconds: float) -> list[Decision]:
    decisions, step = [], 0
    while not (decision := director.decide(step)).stopped_by:
        decisions.append(decision)
        clock.now += seconds
        budget.record_step(seconds)
        step += 1
    return [*decisions, decision]


@pytest.mark.parametrize("mode", ["decides", "leaves"])
def test_ranks_with_clocks_of_their_own_hold_the_same_learning_rate_and_leave_together(
    mode, start_several, tmp_path
) -> None:
    """Rank 1's clock is hours ahead and runs fifty times too fast, rank 2 is slow."""
    for process in start_several(3, mode):
        _, error = process.communicate(timeout=90)
        assert process.returncode == 0, error
    first, *others = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3))
    for other in others:
        assert other["trace"] == first["trace"]
        assert other["stopped_by"] == first["stopped_by"]
    steps = [step for step, *_ in first["trace"]]
    assert steps == list(range(len(steps)))
    if mode == "leaves":
        assert len(steps) == 20
        assert first["stopped_by"] == "SIGUSR1"
        return
    assert first["stopped_by"] == "time_budget"
    assert 2.0 < first["elapsed"] < 3.5
    _, validated, saved, exported = zip(*(entry[1:] for entry in first["trace"]), strict=True)
    assert sum(validated) in (8, 9)
    assert sum(saved) in (2, 3)
    assert sum(exported) == 1


def test_the_last_learning_rate_is_zero_within_a_steps_share() -> None:
    for seconds in (0.9, 1.0, 1.7, 7.0):
        clock = FakeClock()
        budget = Budget(seconds=100.0, max_steps=None, clock=clock)
        budget.start(0)
        *steps, _ = decisions_of_a_run(alone(budget), clock, budget, seconds)
        assert 1.0 - steps[-1].schedule_position <= seconds / 100.0 + 1e-9
        assert [step.progress for step in steps] == sorted(step.progress for step in steps)


def test_in_a_run_of_steps_the_last_learning_rate_is_exactly_zero() -> None:
    clock, budget = FakeClock(), Budget(seconds=None, max_steps=7)
    budget.start(0)
    *steps, last = decisions_of_a_run(alone(budget), clock, budget, 1.0)
    assert [step.progress for step in steps] == pytest.approx([step / 7 for step in range(1, 8)])
    assert steps[-1].schedule_position == 1.0
    assert last.stopped_by == "max_steps"


def test_what_would_pass_the_deadline_is_left_out() -> None:
    """Validation at 90 % would take longer than what is left: the closing validates anyway."""
    clock = FakeClock()
    budget = Budget(seconds=100.0, max_steps=None, clock=clock)
    budget.start(0)
    director = alone(budget, saving=Cadence(0.45), durations={"validate": 12.0})
    *steps, _ = decisions_of_a_run(director, clock, budget, 3.0)
    validated = [step.progress for step in steps if step.validate]
    assert len(validated) == 8
    assert max(validated) < 0.9
    assert [round(step.progress, 2) for step in steps if step.save] == [0.45, 0.9]


def test_each_mark_for_an_export_comes_once_even_where_one_step_passes_two() -> None:
    clock, budget = FakeClock(), Budget(seconds=None, max_steps=10)
    budget.start(0)
    director = alone(budget, export_marks={1: 0.25, 2: 0.61, 3: 0.65})
    *steps, _ = decisions_of_a_run(director, clock, budget, 1.0)
    exports = {step.export: round(step.progress, 2) for step in steps if step.export}
    assert exports == {1: 0.3, 2: 0.7, 3: 0.8}


@pytest.mark.parametrize("reason", INTERRUPTIONS)
def test_what_asks_a_rank_to_leave_is_the_reason(reason: str) -> None:
    budget = Budget(seconds=None, max_steps=10)
    budget.start(0)
    assert alone(budget, pending=lambda: reason).decide(3).stopped_by == reason


def test_a_budget_that_is_spent_is_the_reason_whatever_else_has_come() -> None:
    budget = Budget(seconds=None, max_steps=10)
    assert alone(budget, pending=lambda: "SIGTERM").decide(10).stopped_by == "max_steps"


def test_at_a_pause_a_signal_comes_first_because_a_validation_is_still_to_be_made() -> None:
    budget = Budget(seconds=None, max_steps=10, pause_at=0.35)
    assert [alone(budget).decide(step).stopped_by for step in (3, 4)] == [None, "pause"]
    assert alone(budget, pending=lambda: "SIGTERM").decide(4).stopped_by == "SIGTERM"


@pytest.mark.parametrize(("mark", "known"), [(0.95, {"validate": 2.85}), (0.9, {"validate": 4.5}), (0.95, {})])
def test_behind_whatever_comes_late_a_step_still_brings_the_learning_rate_to_zero(mark, known) -> None:
    clock = FakeClock()
    budget = Budget(seconds=60.0, max_steps=None, clock=clock)
    budget.start(0)
    director = alone(budget, validation=Cadence(mark), saving=Cadence(1.0), durations=known)
    last, step = None, 0
    while not (decision := director.decide(step)).stopped_by:
        clock.now += 0.5
        budget.record_step(0.5)
        clock.now += 2.0 if decision.validate else 0.0
        last, step = decision, step + 1
    assert budget.elapsed() <= 60.0
    assert 1.0 - last.schedule_position <= 0.5 / 60.0 + 1e-9
