"""What Optuna decides is a function of the search and its runs, and is what Optuna itself would decide."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.sampling import distributions, importance, is_pruned, propose
from pretrain.search_config import Hyperband, Range, SearchConfig
from pretrain.search_runs import SearchRun

LISTS = {"train_batch_size": [32, 64, 128], "optimizer.learning_rate": [1e-3, 1e-2], "schedule_length": [None, "3d"]}
RANGES = {"train_batch_size": Range(32, 4096, log=True), "optimizer.learning_rate": Range(1e-5, 1e-1, log=True)}
BASE = PretrainConfig(time_budget="100s")


def searched(
    config: SearchConfig, num_runs: int, course: Callable[[int, dict[str, Any]], dict[str, Any]]
) -> list[SearchRun]:
    """The runs of a search, each told to the next as ``course`` of its number and parameters has it."""
    runs: list[SearchRun] = []
    for number in range(num_runs):
        parameters = propose(config, runs)
        runs.append(SearchRun(number, parameters, **course(number, parameters)))
    return runs


def every_state(number: int, parameters: dict[str, Any]) -> dict[str, Any]:
    state = ["finished", "diverged", "dropped", "failed", "running", "waiting", "paused"][number % 7]
    loss = 3.0 + number / 10 if state == "finished" else None
    return {"state": state, "curve": () if state == "waiting" else ((9.5, 6.0), (20.0, 5.0)), "final_loss": loss}


def best_at_3e_4(number: int, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"state": "finished", "final_loss": 2.0 + abs(math.log10(parameters["optimizer.learning_rate"] / 3e-4))}


def test_the_space_is_optunas() -> None:
    assert distributions(LISTS | RANGES) == {
        "train_batch_size": IntDistribution(32, 4096, log=True),
        "optimizer.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
        "schedule_length": CategoricalDistribution([None, "3d"]),
    }
    assert distributions(LISTS)["train_batch_size"] == CategoricalDistribution([32, 64, 128])


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_space_of_lists_is_tried_to_its_end_without_repeating_any(sampler: str) -> None:
    config = SearchConfig(BASE, LISTS, sampler=sampler, num_runs=12)
    runs = searched(config, 12, every_state)
    tried = [dict(run.parameters) for run in runs]
    assert sorted(tried, key=repr) == sorted(config.grid(), key=repr)
    assert tried != config.grid()
    with pytest.raises(UserError, match="have been tried after 12"):
        propose(config, runs)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_next_configuration_follows_from_the_search_and_its_runs(sampler: str) -> None:
    config = SearchConfig(BASE, RANGES, sampler=sampler, num_runs=100)
    runs = searched(config, 14, every_state)
    proposed = propose(config, runs)
    assert propose(config, runs) == proposed
    for run in runs:
        for name, values in RANGES.items():
            assert values.low <= run.parameters[name] <= values.high
    assert len({repr(run.parameters) for run in runs}) == len(runs)
    assert propose(replace(config, seed=1), runs) != proposed


def test_tpe_learns_from_the_runs_and_random_does_not() -> None:
    """Of random draws, a quarter lies within half an order of magnitude of the best."""
    near = {}
    for sampler in ("random", "tpe"):
        config = SearchConfig(BASE, RANGES, sampler=sampler, num_runs=60)
        runs = searched(config, 60, best_at_3e_4)
        near[sampler] = sum(run.final_loss < 2.5 for run in runs[20:])
    assert near["random"] <= 14
    assert near["tpe"] >= 20


def test_only_what_a_run_takes_is_proposed() -> None:
    config = SearchConfig(BASE, RANGES, sampler="random", num_runs=20, gpus_per_run=32)
    runs = searched(config, 20, every_state)
    assert all(run.parameters["train_batch_size"] % 32 == 0 for run in runs)
    assert len({run.parameters["train_batch_size"] for run in runs}) > 10


def hyperband(budget: dict[str, Any], first: str) -> SearchConfig:
    every = {"validation_interval": "10%", "early_validation_interval": None, "checkpoint_interval": "10%"}
    config = PretrainConfig(**budget, **every)
    return SearchConfig(config, RANGES, sampler="random", num_runs=99, hyperband=Hyperband(first, 2))


@pytest.mark.parametrize(
    "budget", [{"time_budget": "80s"}, {"time_budget": None, "max_steps": 80}], ids=["time", "steps"]
)
def test_hyperband_drops_whom_optuna_would_drop(budget: dict[str, Any]) -> None:
    """Runs side by side, told to a study of Optuna's own point by point."""
    config = hyperband(budget, "12.5%")
    study = optuna.create_study(
        study_name="search",
        pruner=optuna.pruners.HyperbandPruner(min_resource=10, max_resource=80, reduction_factor=2),
    )
    draw = random.Random(0)
    runs = [SearchRun(number, {}, "running") for number in range(16)]
    trials = [study.ask() for _ in runs]
    asked, dropped = 0, set()
    while running := [run for run in runs if run.number not in dropped and len(run.curve) < 7]:
        run = draw.choice(running)
        position, loss = 10 * (len(run.curve) + 1), draw.uniform(1, 10)
        runs[run.number] = replace(run, curve=(*run.curve, (position + 0.4, loss)))
        trials[run.number].report(loss, position)
        reason = is_pruned(config, runs, runs[run.number])
        assert (reason is not None) == trials[run.number].should_prune()
        asked += 1
        if reason:
            assert f"{loss:.3f} at {position} {'s' if budget['time_budget'] else 'steps'}" in reason
            dropped.add(run.number)
    assert 4 < len(dropped) < 16
    assert asked > 50


def test_hyperband_judges_nobody_before_its_first_rung() -> None:
    config = hyperband({"time_budget": "80s"}, "20s")
    good = [SearchRun(number, {}, "running", curve=((20.0, 1.0),)) for number in range(20)]
    early, late = (SearchRun(20, {}, "running", curve=points) for points in ((), ((19.0, 9.0),)))
    assert is_pruned(config, [*good, early], early) is None
    assert is_pruned(config, [*good, late], late) is None


def test_the_option_that_decides_the_losses_is_the_important_one() -> None:
    config = SearchConfig(BASE, RANGES, sampler="random", num_runs=30)
    shares = importance(RANGES, searched(config, 30, best_at_3e_4))
    assert list(shares) == ["optimizer.learning_rate", "train_batch_size"]
    assert shares["optimizer.learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(type(share) is float for share in shares.values())


def test_too_few_or_equal_losses_tell_no_importance() -> None:
    configurations = SearchConfig(BASE, LISTS).grid()
    alike = [SearchRun(n, parameters, "finished", final_loss=2.0) for n, parameters in enumerate(configurations)]
    differing = [replace(run, final_loss=2.0 + run.number) for run in alike]
    assert importance(LISTS, []) == importance(LISTS, alike) == importance(LISTS, differing[:3]) == {}
    unfinished = [replace(run, state="dropped", final_loss=None) for run in differing[3:]]
    assert importance(LISTS, [*differing[:3], *unfinished]) == {}
    assert importance(LISTS, differing).keys() == LISTS.keys()
