"""Rungs decide as soon as it is certain, and not before."""

import itertools
import math
import random
from decimal import ROUND_CEILING, Decimal

import pytest

from pretrain.rungs import Rung, verdict


@pytest.mark.parametrize("keep", ["below 6.0", "below 6", " below  6.00 ", "Below 6.0"])
def test_a_bound_is_read_however_it_is_spaced(keep: str) -> None:
    rung = Rung("3h", keep)
    assert (rung.bound, rung.share) == (6.0, None)


@pytest.mark.parametrize("keep", ["top 50 %", "top 50%", " top  50  % ", "top 50.0 %", "top50%"])
def test_a_share_is_read_however_it_is_spaced(keep: str) -> None:
    rung = Rung("12h", keep)
    assert (rung.bound, rung.share) == (None, 0.5)


@pytest.mark.parametrize(
    "keep", ["", "6.0", "above 6.0", "below", "below six", "below -1", "below 0", "top 50", "50 %"]
)
def test_anything_else_is_refused_with_both_forms(keep: str) -> None:
    with pytest.raises(ValueError, match=r"rung at 3h: .*below 6\.0.*top 50 %"):
        Rung("3h", keep)


@pytest.mark.parametrize("keep", ["top 0 %", "top 100 %", "top 150 %"])
def test_a_share_that_keeps_none_or_all_is_refused(keep: str) -> None:
    with pytest.raises(ValueError, match="between 0 % and 100 %"):
        Rung("3h", keep)


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="rung: at: 'soon' is not a duration"):
        Rung("soon", "below 6.0")


def test_a_rung_lies_at_its_share_of_the_run() -> None:
    assert Rung("3h", "below 6.0").mark(86_400) == 0.125
    assert Rung("12.5%", "below 6.0").mark(86_400) == Rung("12.5%", "below 6.0").mark(None) == 0.125
    with pytest.raises(ValueError, match="max_steps"):
        Rung("3h", "below 6.0").mark(None)


def num_kept(num_runs: int, percent: str) -> int:
    return int((Decimal(percent) / 100 * num_runs).to_integral_value(ROUND_CEILING))


def outcomes(losses: list[tuple[float, int]], own: tuple[float, int], num_open: int, percent: str) -> set[str]:
    """What becomes of ``own`` in every future: each open run comes better than all, worse than all, or never."""
    result = set()
    for future in itertools.product(("better", "worse", "never"), repeat=num_open):
        arrivals = [
            (0.0 if fate == "better" else 99.0, 1000 + number) for number, fate in enumerate(future) if fate != "never"
        ]
        ranked = sorted([*losses, *arrivals])
        result.add("goes on" if own in ranked[: num_kept(len(ranked), percent)] else "dropped")
    return result


@pytest.mark.parametrize("percent", ["10", "33.3", "50", "70", "99"])
def test_a_verdict_is_what_all_futures_agree_on(percent: str) -> None:
    share = Rung("1h", f"top {percent} %").share
    for num_reached, num_open in itertools.product(range(1, 8), range(5)):
        # Losses repeat: among equals the lower number is better.
        losses = [(float(random.Random(number).randint(1, 4)), number) for number in range(num_reached)]
        for own in losses:
            expected = outcomes(losses, own, num_open, percent)
            found = verdict(losses, own, num_open, share)
            assert found == (expected.pop() if len(expected) == 1 else None), (losses, own, num_open)


@pytest.mark.parametrize(("percent", "num_runs"), [("7", 100), ("28", 25), ("56", 25)])
def test_the_share_is_rounded_up_exactly(percent: str, num_runs: int) -> None:
    """0.07 * 100 is 7.000000000000001 in binary."""
    losses = [(float(number), number) for number in range(num_runs)]
    share = Rung("1h", f"top {percent} %").share
    kept = [verdict(losses, own, 0, share) for own in losses].count("goes on")
    assert kept == num_kept(num_runs, percent) < math.ceil(share * num_runs)


def test_the_best_half_of_the_papers_runs_is_decided_before_the_last_has_come() -> None:
    losses = [(1.7 + number / 1000, number) for number in range(100)]
    assert verdict(losses, losses[45], 8, 0.5) == "goes on"
    assert verdict(losses, losses[46], 8, 0.5) is None
    assert verdict(losses, losses[53], 8, 0.5) is None
    assert verdict(losses, losses[54], 8, 0.5) == "dropped"
