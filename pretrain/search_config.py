"""The configuration of a search: the run that all have in common, what varies, and which runs go on."""

import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal

from common.errors import UserError
from common.storage import refuse_password
from pretrain.batch_plan import check_divisible
from pretrain.budget import share_of_run
from pretrain.config import PretrainConfig
from pretrain.early_stop import StopRule
from pretrain.rungs import Rung

Value = int | float | str | bool | None

_FIXED = {
    "time_budget": "all runs of a search have the same budget",
    "max_steps": "all runs of a search have the same budget",
    "resume": "the search itself resumes its runs",
    "pause_at": "the search itself pauses its runs: give rungs",
    "early_stop": "the search itself ends its runs: give rungs",
    "export_at": "it takes a list",
}


@dataclass(frozen=True)
class Range:
    """All numbers between two."""

    low: int | float
    """the smallest"""
    high: int | float
    """the largest"""
    log: bool = False
    """whether the orders of magnitude are equally likely rather than the numbers"""


@dataclass(frozen=True)
class Hyperband:
    """Optuna's asynchronous Hyperband (Li et al. 2018, with the successive halving of Li et al. 2020)."""

    first: str = "12.5%"
    """time or share of the run from which on runs are judged"""
    reduction_factor: int = 3
    """one run in so many goes on, each time that as many times the budget is spent"""


@dataclass(frozen=True)
class SearchConfig:
    """A search for the best configuration of a pretraining run under one budget."""

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """what all runs have in common, budget included"""
    space: dict[str, list[int | float | str | bool | None] | Range] = field(default_factory=dict)
    """what varies: options of a run, like optimizer.learning_rate, each with a list of values, or for random and tpe
    a range like {low: 1e-4, high: 1e-2, log: true}"""
    rungs: list[Rung] = field(default_factory=list)
    """times at which runs that do not do well are dropped, like {at: 3h, keep: below 6.0}, {at: 12h, keep: top 50 %}"""
    hyperband: Hyperband | None = None
    """Optuna's Hyperband decides who is dropped, instead of rungs"""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination; random: drawn from the space; tpe: Optuna's, which learns from the runs so far"""
    num_runs: int | None = None
    """how many configurations random and tpe try"""
    gpus_per_run: int | None = None
    """processes of a run, one a GPU; without GPUs, processes on the CPU; default: all GPUs of the machine, or 1"""
    keep_dropped_checkpoints: bool = False
    """keep the checkpoints of runs that have been dropped"""
    storage: str | None = None
    """URL of an Optuna storage (sqlite or postgresql) of this search alone, which several machines may share; default:
    a SQLite file in the output folder"""
    seed: int = 42
    """of random and tpe"""

    def __post_init__(self) -> None:
        for name in ("early_stop", "pause_at"):
            if getattr(self.pretrain, name):
                raise ValueError(f"pretrain.{name}: {_FIXED[name]}")
        if self.pretrain.resume != "auto":
            raise ValueError(f"pretrain.resume must be auto, not {self.pretrain.resume}: {_FIXED['resume']}")
        if self.gpus_per_run is not None and self.gpus_per_run < 1:
            raise ValueError(f"gpus_per_run must be at least 1, not {self.gpus_per_run}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        refuse_password(self.storage)
        if re.match(r"sqlite:///[^/]", self.storage or ""):
            raise ValueError(
                f"storage {self.storage} means another file in another working directory: give its whole path, like "
                "sqlite:////home/me/trials.db"
            )
        self._check_space()
        self._check_rungs()
        self._check_sampler()
        for parameters in self._samples():
            self.run_config(parameters)

    # --- checks ---

    def _check_space(self) -> None:
        if not self.space:
            raise ValueError("space is empty: give at least one option of a run with the values to try")
        kinds = option_kinds()
        for name, values in self.space.items():
            if name not in kinds:
                nearest = difflib.get_close_matches(str(name), kinds, 1, 0.0)[0]
                raise ValueError(f"space: a run has no option {name}; the nearest is {nearest}")
            if name in _FIXED:
                raise ValueError(f"space: {name} cannot vary: {_FIXED[name]}")
            if isinstance(values, Range):
                _check_range(name, values, kinds[name])
            else:
                _check_values(name, values, kinds[name])
        if any([self.pretrain.init_from, *self.space.get("init_from", [])]):
            sizes = [name for name in self.space if name.startswith("model.") and "dropout" not in name]
            if sizes:
                raise ValueError(f"space: {sizes[0]} cannot vary where init_from gives a model with sizes of its own")

    def _check_sampler(self) -> None:
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.sampler == "grid":
            if ranges:
                raise ValueError(f"space: {ranges[0]} is a range, which a grid cannot try: list values, or take tpe")
            if self.num_runs is not None:
                raise ValueError("num_runs is for random and tpe: a grid has as many runs as combinations")
        elif self.num_runs is None:
            raise ValueError(f"sampler {self.sampler} needs num_runs: give how many configurations it should try")
        elif self.num_runs < 1:
            raise ValueError(f"num_runs must be at least 1, not {self.num_runs}")
        elif not ranges and self.num_runs > (most := self._num_possible(self.num_runs)):
            raise ValueError(f"num_runs {self.num_runs} is more than the {most} combinations that a run takes")

    def _num_possible(self, enough: int) -> int:
        """How many combinations of values a run takes; no more than ``enough`` are looked for."""
        return sum(1 for _ in itertools.islice(filter(self._is_possible, self.combinations()), enough))

    def _is_possible(self, parameters: Mapping[str, Any]) -> bool:
        try:
            self.run_config(parameters)
        except ValueError:
            return False
        return True

    def _check_rungs(self) -> None:
        if self.rungs and self.hyperband:
            raise ValueError("give either rungs or hyperband")
        if self.hyperband and self.hyperband.reduction_factor < 2:
            raise ValueError(f"hyperband: reduction_factor must be at least 2, not {self.hyperband.reduction_factor}")
        times = [(f"rung at {rung.at}", rung.at) for rung in self.rungs]
        times += [("hyperband: first", self.hyperband.first)] if self.hyperband else []
        marks: dict[str, str] = {}
        for place, at in times:
            try:
                mark = share_of_run(at, self.pretrain.budget_seconds)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if mark >= 1:
                raise ValueError(f"{place}: {at} is not before the end of the run ({self._budget})")
            if (same := f"{mark:.9g}") in marks:
                raise ValueError(f"{place}: another rung is at the same time ({marks[same]})")
            marks[same] = at

    @property
    def _budget(self) -> str:
        return self.pretrain.time_budget or f"{self.pretrain.max_steps} steps"

    # --- what is tried ---

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values, in the order of the file; the last name varies fastest."""
        return list(self.combinations())

    def combinations(self) -> Iterator[dict[str, Any]]:
        """:meth:`grid`, one at a time: a space of lists may have more than fit into memory."""
        for values in itertools.product(*self.space.values()):
            yield dict(zip(self.space, values, strict=True))

    def _samples(self) -> Iterator[dict[str, Any]]:
        """What to check: all of a grid; else each value once, and both ends of a range."""
        if self.sampler == "grid":
            yield from self.combinations()
            return
        axes = {name: [v.low, v.high] if isinstance(v, Range) else v for name, v in self.space.items()}
        first = {name: values[0] for name, values in axes.items()}
        for name, values in axes.items():
            for value in values:
                yield first | {name: value}

    def run_config(self, parameters: Mapping[str, Any]) -> PretrainConfig:
        """The configuration of a run with these values, which the rungs with a bound end by itself.

        Raises:
            ValueError: the run's own checks refuse it; the message names the values.
        """
        rules = [StopRule(rung.at, "validation_loss", rung.bound) for rung in self.rungs if rung.bound is not None]
        try:
            config = _replaced(self.pretrain, {**parameters, "early_stop": rules})
            if self.gpus_per_run is not None:
                check_divisible(config.train_batch_size, config.micro_batch_size, self.gpus_per_run)
        except (ValueError, UserError) as error:
            raise ValueError(f"space: {describe(parameters)}: {error}") from None
        return config

    @property
    def pauses(self) -> list[Rung]:
        """The rungs at which a run pauses, in the order in which it gets there."""
        tops = [rung for rung in self.rungs if rung.share is not None]
        return sorted(tops, key=lambda rung: rung.mark(self.pretrain.budget_seconds))

    @property
    def num_planned(self) -> int:
        """How many configurations are tried."""
        return self._num_combinations if self.num_runs is None else self.num_runs

    @property
    def _num_combinations(self) -> int:
        return math.prod(map(len, self.space.values()))


def describe(parameters: Mapping[str, Any]) -> str:
    """A configuration for people: ``train_batch_size 4096, optimizer.learning_rate 0.001``."""
    return ", ".join(f"{name} {'null' if value is None else value}" for name, value in parameters.items())


def option_kinds(config_class: type = PretrainConfig) -> dict[str, Any]:
    """The type of every option of a run, those of its parts by dotted names."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if is_dataclass(kind):
            kinds |= {f"{name}.{inner}": inner_kind for inner, inner_kind in option_kinds(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def number_kind(kind: Any) -> type | None:
    """``int`` or ``float`` of an option that takes such numbers; None of any other."""
    return next((number for number in (float, int) if number in _alternatives(kind)), None)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _takes(kind: Any, value: Value) -> bool:
    """Whether an option of this type takes the value; a whole number is a real one, too."""
    return any(
        value in typing.get_args(alternative)
        if typing.get_origin(alternative) is Literal
        else type(value) is alternative or (alternative is float and type(value) is int)
        for alternative in _alternatives(kind)
    )


def _check_values(name: str, values: list[Value], kind: Any) -> None:
    if not values:
        raise ValueError(f"space: {name} has no values: list at least one")
    for value in values:
        if not _takes(kind, value):
            raise ValueError(f"space: {name} takes no {value!r}")
        if values.count(value) > 1:
            raise ValueError(f"space: {name} has {value} twice")


def _check_range(name: str, values: Range, kind: Any) -> None:
    number = number_kind(kind)
    if number is None:
        raise ValueError(f"space: {name} takes no numbers, and so no range: list its values")
    if number is int and not (type(values.low) is int and type(values.high) is int):
        raise ValueError(f"space: {name} takes whole numbers: give such ones as low and high")
    if not -math.inf < values.low < values.high < math.inf:
        raise ValueError(f"space: {name}: low {values.low} must be below high {values.high}, and both finite")
    if values.log and values.low <= 0:
        raise ValueError(f"space: {name}: low {values.low} must be above 0 for log")


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass with other values of the fields that dotted names tell."""
    changes = {name: value for name, value in values.items() if "." not in name}
    for part in {name.partition(".")[0] for name in values if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{part}.")}
        changes[part] = _replaced(getattr(config, part), inner)
    return replace(config, **changes)
