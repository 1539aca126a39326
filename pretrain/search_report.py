"""The report on a search: its best configurations, what each value and rung did, curves, hours and cost."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.folders import errors_of_writing, write_json
from common.page import Document, Plot, write_documents
from pretrain.plots import PUBLISHED_SEARCH, duration
from pretrain.report import UNKNOWN, add_published, amount, check_price, perplexity
from pretrain.runs import Run
from pretrain.search_config import SearchConfig
from pretrain.search_plots import curves_figure, importance_figure, value_panels
from pretrain.search_results import (
    BEST_FILE,
    RESULTS_FILE,
    Results,
    make_results,
    planned_runs,
    titles,
    value_text,
)
from pretrain.search_runs import SearchRun

_NUM_BEST: Final = 10
_SECOND: Final = 1 / 3600  # less than that is not a kill's: a run that leaves in order still writes down that it does
_PUBLISHED_SPACE: Final = {"train_batch_size", "optimizer.learning_rate", "warmup_proportion", "schedule_length"}
_STATES: Final = ("finished", "dropped", "diverged", "failed", "running", "paused", "waiting")


def write_report(
    config: SearchConfig,
    facts: Mapping[str, Any],
    runs: Sequence[SearchRun],
    references: Sequence[Run],
    folder: Path,
    price_per_gpu_hour: float | None = None,
) -> None:
    """Write ``results.json`` and, from it alone, ``report.md``, ``report.html`` and the figures into ``folder``.

    Args:
        config: the search.
        facts: what all runs have in common, see :func:`pretrain.search_results.make_results`.
        runs: as far as they are; the search may be under way.
        references: runs outside the search to show beside it.
        folder: the search's own.
        price_per_gpu_hour: of one device, in any currency; without it there is no cost.

    Raises:
        UserError: the price is none, or the folder can't be written to.
    """
    check_price(price_per_gpu_hour)
    results = make_results(config, facts, runs, references)
    plots = _plots(results)
    with errors_of_writing(folder):
        write_json(folder / RESULTS_FILE, results)
        title = f"Hyperparameter search: {planned_runs(config)}"
        write_documents(folder, title, plots, lambda document: _fill(document, results, plots, price_per_gpu_hour))


def _fill(document: Document, results: Results, plots: Sequence[Plot], price: float | None) -> None:
    _add_outcome(document, results)
    _add_best(document, results)
    if results["search"]["space"].keys() >= _PUBLISHED_SPACE:
        add_published(document, PUBLISHED_SEARCH)
    for plot in plots:
        document.plot(plot)
        if plot.name == "values":
            _add_values(document, results)
    _add_rungs(document, results)
    _add_hours(document, results, price)
    _add_how(document, results)
    _add_runs(document, results)


def _plots(results: Results) -> list[Plot]:
    plots = []
    if panels := value_panels(results):
        caption = (
            "Final validation loss of the finished runs by the value of each hyperparameter (as in Figure 1 of the"
            " paper): a point is a run, the stroke the median, in brackets how many runs. Runs that were dropped are"
            " not shown, so values with few runs are those that did badly early. Of a range: each run at its value."
        )
        plots.append(Plot("values", "Final loss by value", panels, caption))
    if figure := curves_figure(results):
        caption = (
            "Validation loss over the course of each run (as in Figure 2 of the paper). Finished runs are coloured by"
            f" rank, the best ones named by their {_short_names(results)}. Grey: dropped, with a mark where; red"
            " crosses: diverged, at the last finite loss; dotted lines: the rungs; black: references."
        )
        plots.append(Plot("curves", "Every run's course", figure, caption))
    if figure := importance_figure(results):
        caption = (
            "How much of the final loss's variance over the space each hyperparameter explains (Optuna's fANOVA, which"
            " makes them add up to 100 %), from finished runs only. What was dropped early does not count, so a"
            " hyperparameter whose bad values are dropped looks less important than it is."
        )
        plots.append(Plot("importance", "Importance", figure, caption))
    return plots


def _short_names(results: Results) -> str:
    return " · ".join(titles(results["search"]["space"]).values())


def _add_outcome(document: Document, results: Results) -> None:
    search, best = results["search"], results["best"]
    counts = Counter(run["state"] for run in results["runs"])
    told = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state]) or "none has begun"
    planned = f"Of {search['planned']}: {told}."
    if best is None:
        document.paragraph(f"No run has finished yet, so there is no best configuration. {planned}")
        return
    names = titles(search["space"])
    values = ", ".join(f"{names[name]} {value_text(value)}" for name, value in best["parameters"].items())
    document.paragraph(
        f"The lowest final validation loss is {best['final_loss']:.4f} (perplexity {perplexity(best['final_loss'])}),"
        f" of run {best['run']}: {values}. {planned}"
    )
    if _is_under_way(results):
        document.paragraph("The search is under way: this is what it has brought so far.")
    document.paragraph(f"{BEST_FILE} holds that configuration: run_pretraining.py --config {BEST_FILE} trains it anew.")


def _is_under_way(results: Results) -> bool:
    ended = sum(run["state"] in ("finished", "dropped", "diverged", "failed") for run in results["runs"])
    return ended < results["search"]["num_planned"]


def _add_best(document: Document, results: Results) -> None:
    if not results["finished"] and not results["references"]:
        return
    names = titles(results["search"]["space"])
    document.heading("Best configurations")
    header = ["run", "validation loss", "perplexity", *names.values(), "steps", "sequences", "time"]
    best = [(f"{rank}. run {run['run']}", run) for rank, run in enumerate(results["finished"][:_NUM_BEST], start=1)]
    references = [(run["name"], run) for run in results["references"]]
    document.table(header, [_best_row(title, run, names) for title, run in best + references])
    more = len(results["finished"]) - _NUM_BEST
    document.paragraph(
        "Validation loss: mean cross-entropy over the masked tokens of the whole held-out set under the exported"
        " weights, in nats. Only runs that have spent their whole budget are ranked"
        + (f"; {more} more have." if more > 0 else ".")
        + (" Below them: references outside the search, on the same data, budget and hardware." if references else "")
    )


def _best_row(title: str, run: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    loss = run["final_loss"]
    parameters = run["parameters"]
    return [
        title,
        UNKNOWN if loss is None else f"{loss:.4f}",
        UNKNOWN if loss is None else perplexity(loss),
        *(value_text(parameters[name]) if name in parameters else UNKNOWN for name in names),
        f"{run['steps']:,}",
        f"{run['sequences']:,}",
        duration(run["elapsed_seconds"]),
    ]


def _add_values(document: Document, results: Results) -> None:
    """The figure's numbers; a range has no groups to tell of."""
    rows = [
        [f"{title} {value_text(group['value'])}", str(len(group["losses"])), *_statistics(group)]
        for name, title in titles(results["search"]["space"]).items()
        if not isinstance(results["search"]["space"][name], Mapping)
        for group in results["values"][name]
    ]
    if rows:
        document.table(["value", "finished runs", "median loss", "mean loss", "lowest loss"], rows)


def _statistics(group: Mapping[str, Any]) -> list[str]:
    return [UNKNOWN if group[name] is None else f"{group[name]:.4f}" for name in ("median", "mean", "min")]


def _add_rungs(document: Document, results: Results) -> None:
    document.heading("Who was dropped where")
    if results["rungs"]:
        rows = [
            [f"{rung['at']}: {rung['keep']}", *(str(rung[name]) for name in ("reached", "kept", "dropped", "open"))]
            for rung in results["rungs"]
        ]
        document.table(["rung", "reached", "kept", "dropped", "open"], rows)
    elif results["search"]["hyperband"]:
        dropped = [run["share_spent"] for run in results["runs"] if run["state"] == "dropped"]
        spent = f", after {100 * statistics.median(dropped):.0f} % of its budget in the median" if dropped else ""
        document.paragraph(f"Hyperband dropped {len(dropped)} of {len(results['runs'])} runs{spent}.")
    else:
        document.paragraph("The search has no rungs: every run spends its whole budget.")
    for state in ("diverged", "failed"):
        ended = [run["run"] for run in results["runs"] if run["state"] == state]
        if ended:
            document.paragraph(f"{state.capitalize()}: {', '.join(ended)}.")


def _add_hours(document: Document, results: Results, price: float | None) -> None:
    document.heading("Hours and cost")
    counts = Counter(run["state"] for run in results["runs"])
    hours = results["gpu_hours"]
    numbers = {**counts, "total": len(results["runs"])}
    numbers["unfinished"] = counts["running"] + counts["paused"] + counts["waiting"]
    header = ["runs", "number", "GPU-hours", *(["cost"] if price is not None else [])]
    rows = [
        [name, str(numbers[name]), amount(hours[name]), *([] if price is None else [amount(price * hours[name])])]
        for name in ("finished", "dropped", "diverged", "failed", "unfinished", "total")
        if numbers.get(name)
    ]
    document.table(header, rows)
    full = results["search"]["num_planned"] * _full_hours(results)
    saved = (
        f" Every run to its end would have been about {amount(full)}." if full and not _is_under_way(results) else ""
    )
    lost = (
        f" {amount(hours['lost'])} of them are of work that kills have destroyed." if hours["lost"] >= _SECOND else ""
    )
    document.paragraph(
        "GPU-hours: number of devices x (elapsed + closing + lost) time; without a GPU, a device is a process."
        f"{lost}{saved} Not counted: the start of the processes before a run's clock, and time between starts."
        + (f" Cost: GPU-hours x {price:g} per GPU-hour, in that price's currency." if price is not None else "")
    )


def _full_hours(results: Results) -> float:
    """GPU-hours of a whole run: what the finished ones have taken, on average; 0 where none has finished."""
    finished = [run["gpu_hours"] for run in results["runs"] if run["state"] == "finished"]
    return statistics.fmean(finished) if finished else 0.0


def _add_how(document: Document, results: Results) -> None:
    document.heading("How it was run")
    facts, search, runs = results["facts"], results["search"], results["runs"]
    space = [f"{title}: {_domain_text(search['space'][name])}" for name, title in titles(search["space"]).items()]
    starts = sum(run["starts"] for run in runs)
    document.facts(
        {
            "Space": "; ".join(space),
            "Sampler": search["sampler"],
            "Budget of a run": search["budget"],
            "Model": f"{facts['num_parameters'] / 1e6:,.1f} M parameters" if facts["num_parameters"] else UNKNOWN,
            "Data": f"{facts['data_dir']} (manifest {facts['manifest_sha256'][:8]})",
            "Hardware of a run": facts["hardware"],
            "Starts": f"{starts} of {sum(run['starts'] > 0 for run in runs)} runs, of which"
            f" {sum(max(0, run['starts'] - 1) for run in runs)} went on from a checkpoint or began again",
            "Code": facts["code"] or UNKNOWN,
            "Versions": _versions_text(facts["versions"]),
        }
    )


def _domain_text(domain: Any) -> str:
    if isinstance(domain, Mapping):
        return f"{value_text(domain['low'])} to {value_text(domain['high'])}{', log' if domain['log'] else ''}"
    return ", ".join(map(value_text, domain))


def _versions_text(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _add_runs(document: Document, results: Results) -> None:
    document.heading("All runs")
    names = titles(results["search"]["space"])
    pauses = list(dict.fromkeys(at for run in results["runs"] for at in run["rung_losses"]))
    header = ["run", *names.values(), "state", "because", *(f"loss at {at}" for at in pauses), "loss", "at"]
    rows = [
        [
            run["run"],
            *(value_text(run["parameters"][name]) for name in names),
            run["state"],
            run["because"] or "",
            *(f"{run['rung_losses'][at]:.4f}" if at in run["rung_losses"] else UNKNOWN for at in pauses),
            _last_loss(run),
            f"{100 * run['share_spent']:.0f} %",
            f"{run['steps']:,}",
            amount(run["gpu_hours"]),
        ]
        for run in results["runs"]
    ]
    document.table([*header, "steps", "GPU-hours"], rows)
    document.paragraph("Loss: the final one of a finished run, else the last one of its course, after so much of it.")


def _last_loss(run: Mapping[str, Any]) -> str:
    if run["final_loss"] is not None:
        return f"{run['final_loss']:.4f}"
    return f"{run['curve'][-1][1]:.4f}" if run["curve"] else UNKNOWN
