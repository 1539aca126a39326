"""Every course rises from zero to the peak and comes down as its formula says."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pretrain.schedule import SCHEDULES, lr_multiplier


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.9])
def test_every_course_peaks_at_the_end_of_its_warmup_and_never_rises_again(schedule: str, warmup: float) -> None:
    curve = [lr_multiplier(i / 1000, warmup, schedule) for i in range(1001)]
    peak = round(warmup * 1000)
    assert curve[peak] == pytest.approx(1.0, abs=0.01)
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)
    assert min(curve) >= 0.0
    assert max(curve) <= 1.0
    assert curve[-1] == pytest.approx(0.01 if schedule == "exponential" else 0.0, abs=1e-12)
    assert lr_multiplier(1.7, warmup, schedule) == curve[-1]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_the_courses_are_those_of_transformers(schedule, reference) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = reference(optimizer, num_warmup_steps=50, num_training_steps=1000)
    for step in range(1000):
        assert lr_multiplier(step / 1000, 0.05, schedule) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("position", "expected"), [(0.03, 0.5), (0.5, 1.0), (0.8, 1.0), (0.85, 0.5), (0.95, None)])
def test_wsd_is_constant_and_then_one_minus_a_square_root(position: float, expected: float | None) -> None:
    expected = 1 - math.sqrt(0.75) if expected is None else expected
    assert lr_multiplier(position, 0.06, "wsd") == pytest.approx(expected)


def test_the_exponential_course_falls_by_a_constant_factor_and_warms_up_quadratically() -> None:
    curve = [lr_multiplier(0.1 + 0.1 * i, 0.1, "exponential") for i in range(10)]
    assert [later / sooner for sooner, later in pairwise(curve)] == pytest.approx([curve[1]] * 9)
    assert lr_multiplier(0.05, 0.1, "exponential") == 0.25
