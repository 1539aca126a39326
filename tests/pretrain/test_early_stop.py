"""A run is judged once by each rule, by its best figure at the mark."""

import pytest

from pretrain.config import PretrainConfig
from pretrain.early_stop import EarlyStop, StopRule

RULES = (StopRule("3h", "validation_loss", 6.0), StopRule("50%", "train_loss", 4.0))
DAY = 86_400.0


def test_what_has_come_down_in_time_goes_on_even_if_it_is_worse_at_the_mark() -> None:
    early_stop = EarlyStop(RULES, DAY, {})
    assert early_stop.check("validation_loss", 5.9, 0.05) is None
    assert early_stop.check("validation_loss", 7.5, 0.13) is None
    assert early_stop.check("validation_loss", 9.0, 0.20) is None, "judged already"
    assert early_stop.best == {"validation_loss": 5.9}


def test_what_has_not_is_stopped_by_the_first_figure_from_the_mark_on() -> None:
    early_stop = EarlyStop(RULES, DAY, {})
    assert early_stop.check("validation_loss", 7.0, 0.1249) is None
    assert early_stop.check("train_loss", 7.0, 0.2) is None, "another metric, another mark"
    assert (
        early_stop.check("validation_loss", 6.5, 0.125) == "validation_loss has come down to 6.500 after 3h, not to 6"
    )
    assert early_stop.check("train_loss", 4.5, 0.5) == "train_loss has come down to 4.500 after 50%, not to 4"


def test_a_resume_remembers_the_best() -> None:
    assert EarlyStop(RULES, DAY, {"validation_loss": 5.0}).check("validation_loss", 7.0, 0.3) is None


def test_the_papers_rule_is_a_preset() -> None:
    (rule,) = PretrainConfig(early_stop="24hbert").stop_rules
    assert rule == StopRule("3h", "validation_loss", 6.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"early_stop": "24hbert", "time_budget": "20s"}, "after 3h lies beyond the run of 20s"),
        ({"early_stop": "24hbert", "time_budget": None, "max_steps": 10}, "no meaning in a run of max_steps"),
        ({"export_at": [0.5, 0.50000001]}, "names a share twice"),
        ({"export_at": [1.0]}, "not a share between 0 and 1"),
        ({"pause_at": "24h"}, "pause_at 24h does not lie before the end"),
        ({"hang_timeout": "9999999999d"}, "longer than 3650 days"),
    ],
)
def test_settings_that_make_no_sense(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainConfig(**settings)


def test_a_rule_on_the_validation_loss_has_it_validated_at_its_mark() -> None:
    config = PretrainConfig(
        time_budget="10h", validation_interval="4h", early_validation_interval=None,
        early_stop=[StopRule("3h", "validation_loss", 6.0), StopRule("2h", "train_loss", 7.0)],
    )  # fmt: skip
    validation, _ = config.cadences()
    assert [hour for hour in range(1, 10) if _is_passed(validation, hour / 10)] == [3, 4, 8]


def _is_passed(cadence, progress: float) -> bool:
    due = cadence.is_due(progress)
    cadence.skip_to(progress)
    return due


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_no_loss_has(bound) -> None:
    with pytest.raises(ValueError, match="bound"):
        StopRule("3h", "validation_loss", bound)
