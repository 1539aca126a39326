"""From the runs of a search to ``results.json``: ranks, losses by value, what each rung did, hours.

All tables and figures are told from its content alone.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from common.errors import UserError
from common.folders import plain, write_text
from pretrain.budget import parse_duration
from pretrain.config import PretrainConfig
from pretrain.rungs import Rung
from pretrain.runs import Run
from pretrain.search_config import Range, SearchConfig
from pretrain.search_runs import UNFINISHED, SearchRun

RESULTS_FILE: Final = "results.json"
BEST_FILE: Final = "best.yaml"
_ENDED: Final = ("finished", "dropped", "diverged", "failed")
_TOLERANCE: Final = 1e-9  # of a mark's place: floating point
_CPU_RUN: Final = re.compile(r"(\d+) x CPU, (\d+) thread")
_CPU_SEARCH: Final = re.compile(r"(\d+) process\w* on (\d+) core")

Results = dict[str, Any]


def budget_total(config: SearchConfig) -> float:
    """The budget of a run in its own unit: seconds, or steps."""
    return config.pretrain.budget_seconds or config.pretrain.max_steps


def planned_runs(config: SearchConfig) -> str:
    """What is planned, for people: ``108 runs of 24h``."""
    budget = config.pretrain.time_budget or f"{config.pretrain.max_steps:,} steps"
    return f"{config.num_planned} run{'s' if config.num_planned > 1 else ''} of {budget}"


def share_spent(config: SearchConfig, run: SearchRun) -> float:
    """The share of its budget that a run has spent."""
    spent = run.elapsed_seconds if config.pretrain.budget_seconds else run.steps
    return min(1.0, spent / budget_total(config))


def mark(config: SearchConfig, rung: Rung) -> float:
    """Where a rung lies, as a share of the run."""
    return rung.mark(config.pretrain.budget_seconds)


def rungs_in_order(config: SearchConfig) -> list[Rung]:
    """Both kinds, by where they lie."""
    return sorted(config.rungs, key=lambda rung: mark(config, rung))


def verdict_at(config: SearchConfig, run: SearchRun, rung: Rung) -> Literal["kept", "dropped", "open"] | None:
    """What a rung has done with a run: open while it pauses there; None where the run has not come so far."""
    reached = [rung for rung in rungs_in_order(config) if _has_reached(config, run, rung)]
    if rung not in reached:
        return None
    if rung == reached[-1]:
        return {"dropped": "dropped", "paused": "open"}.get(run.state, "kept")
    return "kept"


def _has_reached(config: SearchConfig, run: SearchRun, rung: Rung) -> bool:
    """A "top" rung has its own validation; a "below" rung judges the first one at or behind its mark."""
    if rung.share is not None:
        return rung.at in run.rung_losses
    place = mark(config, rung) * budget_total(config)
    return bool(run.curve) and run.curve[-1][0] >= place * (1 - _TOLERANCE)


def ranked(runs: Iterable[SearchRun]) -> list[SearchRun]:
    """The finished runs, lowest final loss first; of equal ones the first in the search's order."""
    return sorted((run for run in runs if run.state == "finished"), key=lambda run: (run.final_loss, run.number))


def device_hours(run: SearchRun, num_devices: int) -> float:
    """Hours of all devices of a run together, of everything that they have worked for it."""
    return num_devices * (run.elapsed_seconds + run.closing_seconds + run.lost_seconds) / 3600


def make_results(
    config: SearchConfig, facts: Mapping[str, Any], runs: Sequence[SearchRun], references: Sequence[Run]
) -> Results:
    """The content of ``results.json``.

    Args:
        config: the search.
        facts: ``data_dir``, ``manifest_sha256``, ``hardware``, ``code``, ``versions``, ``gpus_per_run``,
            ``num_parameters``, ``importance`` (shares by name, may be empty).
        runs: as far as they are.
        references: runs outside the search to show beside it.

    Returns:
        ``search`` (what was asked for) and ``facts``; ``finished`` by rank and ``best``, the first of them or None;
        ``runs``, every one, with its curve in the budget's own unit (``search.unit``) and hours; ``values``, for each
        value of each hyperparameter the final losses of the finished runs (Figure 1); ``importance``; ``rungs``;
        ``gpu_hours`` by the state of the runs, in all, and of it what kills destroyed; ``references``. Losses in nats.
    """
    finished = [_finished(run) for run in ranked(runs)]
    num_devices = facts["gpus_per_run"]
    return {
        "search": _search(config),
        "facts": {name: value for name, value in facts.items() if name not in ("importance", "places")},
        "best": finished[0] if finished else None,
        "finished": finished,
        "runs": [_run(config, run, num_devices) for run in runs],
        "values": {name: _losses_by_value(config, name, ranked(runs)) for name in config.space},
        "importance": dict(facts.get("importance") or {}),
        "rungs": [_rung(config, rung, runs) for rung in rungs_in_order(config)],
        "gpu_hours": _gpu_hours(runs, num_devices),
        "references": [_reference(config, run) for run in references],
    }


def _search(config: SearchConfig) -> dict[str, Any]:
    return {
        "budget": config.pretrain.time_budget or f"{config.pretrain.max_steps:,} steps",
        "total": budget_total(config),
        "unit": "s" if config.pretrain.budget_seconds else "steps",
        "space": {name: asdict(of) if isinstance(of, Range) else list(of) for name, of in config.space.items()},
        "sampler": config.sampler,
        "hyperband": config.hyperband and asdict(config.hyperband),
        "num_planned": config.num_planned,
        "planned": planned_runs(config),
    }


def _finished(run: SearchRun) -> dict[str, Any]:
    return {
        "run": run.name,
        "parameters": dict(run.parameters),
        "final_loss": run.final_loss,
        "perplexity": math.exp(min(run.final_loss, 700.0)),
        "steps": run.steps,
        "sequences": run.sequences,
        "elapsed_seconds": run.elapsed_seconds,
    }


def _run(config: SearchConfig, run: SearchRun, num_devices: int) -> dict[str, Any]:
    return {
        "run": run.name,
        "parameters": dict(run.parameters),
        "state": run.state,
        "because": run.because,
        "final_loss": run.final_loss,
        "rung_losses": dict(run.rung_losses),
        "curve": [list(point) for point in run.curve if math.isfinite(point[1])],
        "share_spent": share_spent(config, run),
        "steps": run.steps,
        "sequences": run.sequences,
        "elapsed_seconds": run.elapsed_seconds,
        "lost_seconds": run.lost_seconds,
        "starts": run.starts,
        "gpu_hours": device_hours(run, num_devices),
    }


def _losses_by_value(config: SearchConfig, name: str, finished: Sequence[SearchRun]) -> list[dict[str, Any]]:
    """In the space's order; of a range the values that were tried, rising."""
    options = config.space[name]
    if isinstance(options, Range):
        options = sorted({run.parameters[name] for run in finished})
    groups = [(value, [run.final_loss for run in finished if run.parameters[name] == value]) for value in options]
    return [
        {
            "value": value,
            "losses": losses,
            "median": statistics.median(losses) if losses else None,
            "mean": statistics.fmean(losses) if losses else None,
            "min": min(losses, default=None),
        }
        for value, losses in groups
    ]


def _rung(config: SearchConfig, rung: Rung, runs: Sequence[SearchRun]) -> dict[str, Any]:
    verdicts = [verdict for run in runs if (verdict := verdict_at(config, run, rung))]
    counts = {verdict: verdicts.count(verdict) for verdict in ("kept", "dropped", "open")}
    return {"at": rung.at, "keep": rung.keep, "mark": mark(config, rung), "reached": len(verdicts), **counts}


def _gpu_hours(runs: Sequence[SearchRun], num_devices: int) -> dict[str, float]:
    groups = {state: (state,) for state in _ENDED} | {"unfinished": UNFINISHED}
    hours = {
        name: sum(device_hours(run, num_devices) for run in runs if run.state in states)
        for name, states in groups.items()
    }
    lost = num_devices * sum(run.lost_seconds for run in runs) / 3600
    return {**hours, "total": sum(hours.values()), "lost": lost}


def _reference(config: SearchConfig, run: Run) -> dict[str, Any]:
    at = "elapsed_seconds" if config.pretrain.budget_seconds else "step"
    return {
        "name": run.name,
        "parameters": {name: run.options.get(name) for name in config.space},
        "final_loss": run.final_loss,
        "steps": run.steps,
        "sequences": run.sequences,
        "elapsed_seconds": run.elapsed_seconds,
        "stopped_by": run.stopped_by,
        "curve": [[getattr(point, at), point.loss] for point in run.validation if math.isfinite(point.loss)],
    }


def check_references(config: SearchConfig, facts: Mapping[str, Any], references: Sequence[Run]) -> None:
    """Refuse runs that can't stand beside those of the search.

    Raises:
        UserError: a run is of another data folder, budget or hardware, or does not tell yet.
    """
    for run in references:
        if run.manifest_sha256 is None or run.hardware is None:
            raise UserError(f"reference {run.name} has no checkpoint yet: wait for its first one, or leave it out")
        if difference := _difference(config, facts, run):
            raise UserError(
                f"reference {run.name} has {difference}: a search never mixes data, budgets or hardware;"
                " leave it out, or make it as the search's runs are made"
            )


def _difference(config: SearchConfig, facts: Mapping[str, Any], run: Run) -> str | None:
    if run.manifest_sha256 != facts["manifest_sha256"]:
        return (
            f"another data folder (manifest {run.manifest_sha256[:8]}, the search's is {facts['manifest_sha256'][:8]})"
        )
    search = _search(config)
    if _budget(run) != (search["total"], search["unit"]):
        return f"another budget ({run.budget}, the search's is {search['budget']})"
    if not _is_same_hardware(run, facts):
        return f"other hardware ({run.hardware}, the search's is {facts['hardware']})"
    return None


def _budget(run: Run) -> tuple[float, str]:
    if run.budget.endswith("steps"):
        return float(run.budget.removesuffix("steps").replace(",", "")), "steps"
    return parse_duration(run.budget), "s"


def _is_same_hardware(run: Run, facts: Mapping[str, Any]) -> bool:
    """GPUs go by number and name; a run without them tells of its processes and threads, a search of their cores."""
    own, search = _CPU_RUN.match(run.hardware), _CPU_SEARCH.match(facts["hardware"])
    if own and search:
        processes, cores = int(search[1]), int(search[2])
        return (int(own[1]), int(own[2])) == (processes, max(1, cores // processes))
    return run.hardware == facts["hardware"]


def best_config(config: SearchConfig, runs: Sequence[SearchRun]) -> PretrainConfig | None:
    """The winner as a run of its own, without the search's rungs; None before a run has finished."""
    finished = ranked(runs)
    return replace(config.run_config(finished[0].parameters), early_stop=[]) if finished else None


def write_best(config: SearchConfig, runs: Sequence[SearchRun], folder: Path) -> Path | None:
    """Write ``best.yaml``, which run_pretraining.py takes, into the search's folder; None before a run has finished."""
    best = best_config(config, runs)
    if best is None:
        return None
    finished = ranked(runs)
    header = (
        f"# The best of the search {folder.resolve().name}: run {finished[0].name}, validation loss"
        f" {finished[0].final_loss:.4f} after {_search(config)['budget']}.\n"
        f"# {len(finished)} of {config.num_planned} runs have finished. For run_pretraining.py --config.\n"
    )
    write_text(folder / BEST_FILE, header + yaml.safe_dump(plain(best), sort_keys=False, allow_unicode=True))
    return folder / BEST_FILE


def titles(names: Iterable[str]) -> dict[str, str]:
    """What people call each hyperparameter: the last part of its name, or all of it where that is another's too."""
    names = list(names)
    last = {name: name.split(".")[-1] for name in names}
    counts = list(last.values())
    return {name: (last[name] if counts.count(last[name]) == 1 else name).replace("_", " ") for name in names}


def value_text(value: Any) -> str:
    """A value as people write it: ``2e-3`` for 0.002, ``null`` for None."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            mantissa, exponent = f"{value:.3e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:g}"
    return str(value)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """A configuration in short, in the order of the space: ``4096 · 2e-3 · 0.06 · 1d``."""
    return " · ".join(map(value_text, parameters.values()))
