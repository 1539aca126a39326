"""What a budget buys, told before the money is spent: models and batch sizes side by side, and a rule of thumb."""

import math
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.folders import errors_of_writing
from data_prep.shards import Manifest, read_manifest
from pretrain.architecture import Architecture, resolve
from pretrain.batch_plan import BatchPlan, check_divisible
from pretrain.candidates import Candidate, candidates_of
from pretrain.config import PretrainConfig
from pretrain.data_sample import DataSample, emptiness, sample_data
from pretrain.forecast import Estimate, Forecast, predict
from pretrain.hardware import (
    GOOD_UTILISATION,
    LARGEST_MICRO_BATCH,
    MODEST_UTILISATION,
    Gpu,
    computed_estimate,
    find_gpu,
    first_that_fits,
)
from pretrain.init_from import resolve_from
from pretrain.trial_run import Trial

TOKENS_A_PARAMETER = 20.0  # Hoffmann et al. 2022, for causal language models
STEPS_AIMED_AT = 23_000  # Izsak et al. 2021: their best run, 4,096 sequences a step for 24 hours
_CLOSE = 2.0  # a factor: within it, the rule does not tell which of two is better
_TRIAL_SECONDS = 60.0
_SHORTEST_TRIAL = 4.0
_SHARE_OF_TRIALS = 0.5  # of the budget, all together and at most, where no --trial_seconds is given


@dataclass(frozen=True)
class Request:
    """What is asked for besides the run's configuration."""

    presets: list[str] | None = None
    """To compare, see :func:`pretrain.candidates.candidates_of`."""
    train_batch_sizes: list[int] | None = None
    """To compare, likewise."""
    gpu: str | None = None
    """A name of :data:`pretrain.hardware.GPUS`; None times this machine."""
    num_gpus: int | None = None
    """Processes, one a GPU; default: the GPUs that are here, or one."""
    price_per_gpu_hour: float | None = None
    """In any currency."""
    trial_seconds: float | None = None
    """Budget of each trial; default: a minute, or less where the run's budget is short."""
    folder: Path | None = None
    """Where the trials run and whose free space counts; default: the system's folder for temporary files."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "price_per_gpu_hour", "trial_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Row:
    """A candidate and what is foretold of it."""

    model: str
    train_batch_size: int
    options: str
    """What makes the configuration this candidate, as typed on the command line."""
    parameters: int | None = None
    """All that are trained, embeddings included."""
    forecasts: tuple[Forecast, ...] = ()
    """One that was measured, or two that were computed: at modest and at good utilisation."""
    failure: str | None = None
    """Why there is none, in one line."""


@dataclass(frozen=True)
class Recommendation:
    """What the rule of thumb says."""

    row: Row
    reason: str
    close: list[str]
    """Other models so near the rule's line that they may as well be better."""


@dataclass(frozen=True)
class Plan:
    """All that is told."""

    time_budget: str
    num_gpus: int
    gpu: str | None
    """That was described; None where this machine was timed."""
    trial_seconds: float | None
    price_per_gpu_hour: float | None
    sample: DataSample
    free_bytes: int | None
    """On the disk of the trials."""
    rows: list[Row]
    recommendation: Recommendation


def make_plan(config: PretrainConfig, data_dir: Path, request: Request) -> Plan:
    """Try, or compute, every candidate.

    Raises:
        UserError: no data folder, no time budget, a budget that is shorter than the trials, or no candidate can run.
    """
    if config.budget_seconds is None:
        raise UserError("a plan is for a time_budget: give --time_budget 24h --max_steps null, say")
    manifest = read_manifest(data_dir)
    candidates = candidates_of(config, request.presets, request.train_batch_sizes)
    if request.gpu:
        gpu, num_gpus, trial_seconds = find_gpu(request.gpu), request.num_gpus or 1, None
    else:
        gpu, num_gpus = None, request.num_gpus or max(1, torch.cuda.device_count())
        trial_seconds = _trial_seconds(request.trial_seconds, len(candidates), config)
    planner = _Planner(manifest, sample_data(manifest), gpu, num_gpus, trial_seconds, request.price_per_gpu_hour)
    if request.folder:
        with errors_of_writing(request.folder):
            request.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trials-", dir=request.folder) as folder:
        free_bytes = None if gpu else shutil.disk_usage(folder).free
        rows = [
            planner.row(candidate, Path(folder) / str(number), f"{number} of {len(candidates)}")
            for number, candidate in enumerate(candidates, 1)
        ]
    return Plan(
        time_budget=config.time_budget,
        num_gpus=num_gpus,
        gpu=request.gpu,
        trial_seconds=trial_seconds,
        price_per_gpu_hour=request.price_per_gpu_hour,
        sample=planner.sample,
        free_bytes=free_bytes,
        rows=rows,
        recommendation=recommend(rows),
    )


def _trial_seconds(asked: float | None, trials: int, config: PretrainConfig) -> float:
    """The budget of each trial."""
    seconds = asked or min(_TRIAL_SECONDS, _SHARE_OF_TRIALS * config.budget_seconds / trials)
    if seconds * trials > config.budget_seconds or seconds < (asked or _SHORTEST_TRIAL):
        needed = trials * (asked or _SHORTEST_TRIAL / _SHARE_OF_TRIALS)
        raise UserError(
            f"the budget of {config.time_budget} is too short for {trials} trials, which want one of {needed:.0f}s at "
            "least: give fewer --presets or --train_batch_sizes, a shorter --trial_seconds, or just run it"
        )
    return seconds


@dataclass(frozen=True)
class _Planner:
    """Foretells candidates, one after the other."""

    manifest: Manifest
    sample: DataSample
    gpu: Gpu | None
    num_gpus: int
    trial_seconds: float | None
    price_per_gpu_hour: float | None

    def row(self, candidate: Candidate, folder: Path, number: str) -> Row:
        """A candidate's row; what can't run says why. ``folder`` is for its trial."""
        row = Row(candidate.model, candidate.config.train_batch_size, candidate.options)
        try:
            architecture = _architecture(candidate.config, self.manifest)
            row = replace(row, parameters=architecture.num_parameters)
            check_divisible(candidate.config.train_batch_size, candidate.config.micro_batch_size, self.num_gpus)
            if self.gpu:
                estimates = self._computed(candidate.config, architecture, self.gpu)
            else:
                estimates = (self._measured(candidate, folder, number),)
            return self._told(row, candidate.config, estimates)
        except UserError as error:
            return replace(row, failure=str(error))

    def _measured(self, candidate: Candidate, folder: Path, number: str) -> Estimate:
        trial = Trial(candidate.config, self.manifest.folder, self.num_gpus, self.trial_seconds)
        what = f"trial {number}: {candidate.model}, {candidate.config.train_batch_size:,} sequences a step"
        print(f"{what} ...", file=sys.stderr, flush=True)
        return trial.run(folder)

    def _computed(self, config: PretrainConfig, architecture: Architecture, gpu: Gpu) -> tuple[Estimate, ...]:
        rank_batch_size, size = config.train_batch_size // self.num_gpus, config.micro_batch_size
        if size == "auto":
            limit = min(rank_batch_size, LARGEST_MICRO_BATCH)
            sizes = [size for size in range(limit, 0, -1) if rank_batch_size % size == 0]
        else:
            sizes = [size]
        fitting = first_that_fits(gpu, architecture, self.sample, sizes, self.num_gpus)
        batch_plan = BatchPlan(config.train_batch_size, fitting, self.num_gpus)
        idle_share = emptiness(self.manifest, batch_plan).idle
        return tuple(
            computed_estimate(gpu, utilisation, architecture, self.sample, batch_plan, idle_share)
            for utilisation in (MODEST_UTILISATION, GOOD_UTILISATION)
        )

    def _told(self, row: Row, config: PretrainConfig, estimates: tuple[Estimate, ...]) -> Row:
        micro_batch_size = estimates[0].micro_batch_size
        batch_plan = BatchPlan(config.train_batch_size, micro_batch_size, self.num_gpus)
        padding = emptiness(self.manifest, batch_plan).padding
        if not self.gpu:  # the run need not search for what the trial has found
            row = replace(row, options=f"{row.options} --micro_batch_size {micro_batch_size}")
            estimates = tuple(estimate.without_search() for estimate in estimates)
        forecasts = tuple(
            predict(config, estimate, self.sample, row.parameters, padding, self.num_gpus, self.price_per_gpu_hour)
            for estimate in estimates
        )
        if not min(forecast.course.steps for forecast in forecasts):
            raise UserError(f"not one step ends within {config.time_budget}")
        return replace(row, forecasts=forecasts)


def _architecture(config: PretrainConfig, manifest: Manifest) -> Architecture:
    if config.init_from:
        return resolve_from(config.init_from, manifest, config.model)
    try:
        return resolve(config.model, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def recommend(rows: list[Row]) -> Recommendation:
    """The largest model that sees ``TOKENS_A_PARAMETER``, or the smallest where none does; then the batch whose number
    of steps is nearest to ``STEPS_AIMED_AT``, as a ratio. Of what was computed, the modest figures count.

    Raises:
        UserError: no candidate can run.
    """
    told = [row for row in rows if row.forecasts]
    if not told:
        others = f" (and none of {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise UserError(f"{rows[0].model} can't run{others}: {rows[0].failure}")
    seen = {row.parameters: 0.0 for row in told}
    for row in told:
        seen[row.parameters] = max(seen[row.parameters], row.forecasts[0].tokens_per_parameter)
    enough = [parameters for parameters, tokens in seen.items() if tokens >= TOKENS_A_PARAMETER]
    parameters = max(enough) if enough else min(seen)
    row = min(
        (row for row in told if row.parameters == parameters),
        key=lambda row: abs(math.log(row.forecasts[0].course.steps / STEPS_AIMED_AT)),
    )
    near = {
        other.model
        for other in told
        if other.parameters != parameters and 1 / _CLOSE <= seen[other.parameters] / TOKENS_A_PARAMETER <= _CLOSE
    }
    if not enough:
        reason = f"No model here sees {TOKENS_A_PARAMETER:.0f} tokens a parameter; the smallest comes nearest."
    else:
        reason = f"The largest model here that sees {TOKENS_A_PARAMETER:.0f} tokens a parameter."
    return Recommendation(row, reason, sorted(near))
