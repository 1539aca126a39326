"""What Optuna decides in a search: the next configuration, whom Hyperband drops, and which options matter.

Every answer is a function of the search's configuration and its runs: they are told to a study in memory, which is
forgotten afterwards. So any process on any machine decides alike, and a kill loses nothing.
"""

import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from common.errors import UserError
from pretrain.budget import share_of_run
from pretrain.search_config import Range, SearchConfig, Value, number_kind, option_kinds
from pretrain.search_runs import SearchRun

_STATES: Final = {
    "finished": TrialState.COMPLETE,
    "dropped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_MOST_DRAWS: Final = 100  # until a configuration that is new, and that a run takes, is looked for in order
_MOST_RANDOM_RUNS: Final = 10  # Optuna's own n_startup_trials
_FEWEST_RANDOM_RUNS: Final = 3
_FEWEST_TO_COMPARE: Final = 4
_STUDY: Final = "search"  # Hyperband deals the runs out to its brackets by this name and their numbers

optuna.logging.set_verbosity(logging.WARNING)
warnings.filterwarnings(
    "ignore", category=optuna.exceptions.ExperimentalWarning
)  # multivariate and so on are called so


def distributions(space: Mapping[str, list[Value] | Range]) -> dict[str, BaseDistribution]:
    """The space as Optuna has it, by the options' names."""
    kinds = option_kinds()
    return {name: _distribution(values, kinds[name]) for name, values in space.items()}


def _distribution(values: list[Value] | Range, kind: Any) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    distribution = FloatDistribution if number_kind(kind) is float else IntDistribution
    return distribution(values.low, values.high, log=values.log)


def propose(config: SearchConfig, runs: Sequence[SearchRun]) -> dict[str, Any]:
    """The next configuration that random or tpe tries.

    Args:
        config: of the search; its seed and the number of runs decide what is drawn.
        runs: all so far, with what is known of them.

    Returns:
        A configuration that no run has and that a run's own checks accept.

    Raises:
        UserError: the space has none left.
    """
    tried = [dict(run.parameters) for run in runs]
    trials = _trials(config.space, runs) if config.sampler == "tpe" else []
    for parameters in itertools.chain(_drawn(config, len(runs), trials), _in_order(config)):
        if parameters not in tried and _is_accepted(config, parameters):
            return parameters
    raise UserError(
        f"space: all configurations that a run takes have been tried after {len(runs)}: give fewer num_runs"
    )


def _drawn(config: SearchConfig, num_runs: int, trials: list[FrozenTrial]) -> Iterator[dict[str, Any]]:
    space = distributions(config.space)
    study = optuna.create_study()
    study.add_trials(trials)
    for draw in range(_MOST_DRAWS):
        study.sampler = _sampler(
            config, int(np.random.SeedSequence([config.seed, num_runs, draw]).generate_state(1)[0])
        )
        trial = study.ask(space)
        study.tell(trial, state=TrialState.FAIL)  # it says nothing to the next draw
        yield trial.params


def _sampler(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(
        n_startup_trials=min(_MOST_RANDOM_RUNS, max(_FEWEST_RANDOM_RUNS, config.num_planned // 3)),
        multivariate=True,
        constant_liar=True,  # what is under way counts as bad, so that runs side by side differ
        seed=seed,
    )


def _in_order(config: SearchConfig) -> Iterator[dict[str, Any]]:
    """Every configuration of a space of lists; none where there are ranges."""
    if not any(isinstance(values, Range) for values in config.space.values()):
        yield from config.combinations()


def _is_accepted(config: SearchConfig, parameters: Mapping[str, Any]) -> bool:
    try:
        config.run_config(parameters)
    except ValueError:
        return False
    return True


def _trials(space: Mapping[str, list[Value] | Range], runs: Sequence[SearchRun]) -> list[FrozenTrial]:
    """The runs as Optuna's trials. One that diverged has no curve: nothing is worse."""
    space_of_optuna = distributions(space)
    return [
        optuna.trial.create_trial(
            state=_STATES.get(run.state, TrialState.RUNNING),
            value=run.final_loss if run.state == "finished" else None,
            params=dict(run.parameters),
            distributions=space_of_optuna,
            intermediate_values={} if run.state == "diverged" else _points(run),
        )
        for run in runs
    ]


def _points(run: SearchRun) -> dict[int, float]:
    """The curve at whole seconds or steps, as Optuna counts."""
    return {int(position): loss for position, loss in run.curve}


def is_pruned(config: SearchConfig, runs: Sequence[SearchRun], run: SearchRun) -> str | None:
    """Why Hyperband drops a run at the newest point of its curve; None if it goes on.

    A run is judged by the first point at or behind each of Hyperband's rungs, so this is to be asked at every point.

    Args:
        config: of the search, with ``hyperband``.
        runs: all of them, ``run`` among them, by number from 0.
        run: the one to judge.
    """
    first, budget = _resources(config)
    pruner = optuna.pruners.HyperbandPruner(first, budget, config.hyperband.reduction_factor)
    study = optuna.create_study(study_name=_STUDY, pruner=pruner)
    trials = {other.number: study.ask() for other in sorted(runs, key=lambda other: other.number)}
    is_worse = False
    for other in (*(other for other in runs if other.number != run.number), run):  # the others' rungs first
        for position, loss in _points(other).items():
            trials[other.number].report(loss, position)
            is_worse = trials[other.number].should_prune()
    if not is_worse:
        return None
    position, loss = run.curve[-1]
    unit = "s" if config.pretrain.max_steps is None else "steps"
    return f"validation loss {loss:.3f} at {position:.0f} {unit} is not among the best that Hyperband lets go on"


def _resources(config: SearchConfig) -> tuple[int, int]:
    """From where on runs are judged, and the whole budget: in seconds, or in steps with ``max_steps``."""
    budget = config.pretrain.budget_seconds or config.pretrain.max_steps
    first = share_of_run(config.hyperband.first, config.pretrain.budget_seconds) * budget
    return max(1, round(first)), max(1, round(budget))


def importance(space: Mapping[str, list[Value] | Range], runs: Sequence[SearchRun]) -> dict[str, float]:
    """How much of the final losses' variance each option explains (Optuna's fANOVA; Hutter et al. 2014).

    Returns:
        Shares that sum to 1, the largest first; empty where finished runs are too few or all alike.
    """
    finished = [run for run in runs if run.state == "finished"]
    losses = [run.final_loss for run in finished]
    if len(finished) < _FEWEST_TO_COMPARE or math.isclose(min(losses), max(losses)):
        return {}
    study = optuna.create_study()
    study.add_trials(_trials(space, finished))
    shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in shares.items()}
