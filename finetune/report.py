"""The report of a grid: scores, what was run and how, and figures, as Markdown and as one self-contained page.

Everything is told from the content of ``results.json``, so that it can be told again at any time.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.folders import read_json
from common.page import Document, Plot, write_documents
from finetune.config import STARTED_FROM_MNLI
from finetune.curves import chosen_panels, other_panels
from finetune.model_record import PRETRAINING_FILE
from finetune.plots import START_NAMES, grid_panels, pretraining_figure, scores_panels
from finetune.published import DEVELOPMENT_SET, TEST_SET
from finetune.results import Results
from finetune.run_tables import (
    configuration_texts,
    failures_table,
    missing_table,
    number,
    overfitting_sentence,
    overfitting_table,
    times_table,
)
from finetune.score_tables import (
    average_note,
    deviations,
    enumeration,
    percent,
    replicates_table,
    score_groups,
    score_tables,
    summaries,
    variants_table,
)


def write_report(folder: Path, results: Results) -> None:
    """Write ``report.md``, ``report.html`` and the figures into ``folder``.

    Args:
        folder: the grid's output folder; its ``pretraining.json``, if there, is plotted.
        results: the content of ``results.json``.
    """
    plots = _plots(folder, results)
    title = f"{results['benchmark']}: {results['model']}"
    write_documents(folder, title, plots, lambda document: add_content(document, results, plots))


def add_content(document: Document, results: Results, plots: Sequence[Plot] = ()) -> None:
    """All that the report says, in reading order, with ``plots`` where they belong."""
    _add_statement(document, results)
    _add_scores(document, results)
    _add_missing(document, results)
    if any(facts["is_glue"] for facts in results["task_facts"].values()):
        for published in (TEST_SET, DEVELOPMENT_SET):
            document.heading(published.heading)
            document.table(published.header, published.rows)
            document.paragraph(published.source)
    _add_configurations(document, results)
    _add_replicates(document, results)
    _add_variants(document, results)
    for plot in plots:
        document.plot(plot)
    _add_overfitting(document, results)
    _add_times(document, results)
    _add_rows(document, results)
    _add_failures(document, results)
    _add_protocol(document, results)


_CAPTIONS: Final = {
    "scores": "Every seed's score on the development split, by configuration; the stroke is their median. The"
    " configuration in bold has the highest median.",
    "grid": "Median over the seeds of each configuration; the frame is around the chosen one, grey ones lack a seed."
    " Each panel has its own colours, dark for its lowest median, bright for its highest. Tasks with one configuration"
    " are left out.",
    "curves": "After each epoch, with the chosen configuration (learning rate · batch · epochs): thin lines are seeds,"
    " thick ones the median over them. Training loss is the mean over the epoch, with dropout; points between epochs"
    " are means since the evaluation before.",
    "other-curves": "Every other run: all configurations that were not chosen, and random weights, a thin line for each"
    " seed. The scales are the same within a panel.",
}


def _plots(folder: Path, results: Results) -> list[Plot]:
    panels = {
        ("scores", "Every seed"): scores_panels(results),
        ("grid", "The grid"): grid_panels(results),
        ("curves", "Learning curves"): chosen_panels(results),
        ("other-curves", "Learning curves of the other configurations"): other_panels(results),
    }
    plots = [Plot(name, heading, figures, _CAPTIONS[name]) for (name, heading), figures in panels.items() if figures]
    if (folder / PRETRAINING_FILE).exists():
        pretraining = read_json(folder / PRETRAINING_FILE, "the record of pretraining, copied from the model")
        caption = _pretraining_caption(pretraining)
        plots.append(Plot("pretraining", "Pretraining", pretraining_figure(pretraining), caption))
    return plots


def _add_statement(document: Document, results: Results) -> None:
    done, missing = len(results["trials"]), len(results["missing"])
    titles = [facts["title"] for facts in results["task_facts"].values()]
    first, *others = results["variants"]
    of_variant = f" ({first}; under Variants also {'; '.join(others)})" if others else ""
    document.paragraph(
        f"{results['model']} fine-tuned on {enumeration(titles)}: the median score over {_seeds(results)}"
        f" of each task's best configuration{of_variant} on the development split, with every trial behind it"
        f" ({done:,} of {done + missing:,} are done)."
    )


def _seeds(results: Results) -> str:
    number = len(results["seeds"])
    return f"{number} seed" + ("s" if number != 1 else "")


def _add_scores(document: Document, results: Results) -> None:
    groups, tables = score_groups(results), score_tables(results)
    for (title, names, start), (_, (header, rows)) in zip(groups, tables, strict=True):
        if len(tables) > 1:
            document.heading(title)
        document.table(header, rows)
        if results["task_facts"][names[0]]["is_glue"]:
            document.paragraph(average_note(results, start))
    if len(tables) > 1:
        document.heading("About these scores")
    document.paragraph(_score_note(results))
    if any("gain" in task for task in results["tasks"].values()):
        document.paragraph(
            "Random weights: the same architecture, grid and seeds without pretraining. Gain: the difference of the"
            " medians; “no gain” where it is not above the larger of the two standard deviations."
        )
    if others := deviations(results):
        document.paragraph(f"Not the official rows, so not GLUE scores: {'; '.join(others)}.")
    for facts in results["task_facts"].values():
        if facts["majority"]:
            document.paragraph(_majority_note(facts))


def _score_note(results: Results) -> str:
    epoch = {
        "last": "The score is the last epoch's.",
        "best": "The score is the best epoch's, chosen on the same split too, which makes it higher than a test would.",
    }[results["protocol"]["score_epoch"]]
    return (
        f"Development split, scores x 100: median ± sample standard deviation over {_seeds(results)} of the"
        " configuration with the highest median. The configuration is selected on the split that it is reported on."
        f" {epoch} {_start_note(results)}"
    )


def _start_note(results: Results) -> str:
    facts = results["task_facts"]
    titles = [facts[name]["title"] for name in STARTED_FROM_MNLI if name in facts]
    if not results["mnli_init"] or not titles:
        return "No task starts from another task's model."
    tuned = "the model tuned on MNLI (the median seed of its best configuration)"
    if results["mnli_init"] == "both":
        return f"{enumeration(titles)}: once from the pretrained model, once from {tuned}, a table each."
    return f"{enumeration(titles)}: started from {tuned}."


def _majority_note(facts: Mapping[str, Any]) -> str:
    majority = facts["majority"]
    return (
        f"{facts['title']}: always giving the majority's answer scores {percent(majority['dev'])} on the development"
        f" split and {percent(majority['test'])} on the test server. A score at or below that says nothing about the"
        " model. Most development rows share their text with a training row of the opposite answer, so that a model"
        " that has learned these by heart scores far below it."
    )


def _add_missing(document: Document, results: Results) -> None:
    if not results["missing"]:
        return
    titles = dict.fromkeys(results["task_facts"][cell["task_name"]]["title"] for cell in results["missing"])
    document.heading("Missing trials")
    document.paragraph(
        f"Not complete, so without a median: {', '.join(titles)} ({number(len(results['missing']), 'trial')} missing)."
    )
    document.table(*missing_table(results))


def _add_configurations(document: Document, results: Results) -> None:
    rows = [
        [
            results["task_facts"][name]["title"],
            START_NAMES[summary["initialization"]],
            summary["variant"],
            *(percent(summary[key]) for key in ("median", "mean", "std", "max", "min")),
            str(summary["median_seed"]),
            *configuration_texts(summary["best"]),
            f"{summary['num_configurations']} x {len(results['seeds'])}",
        ]
        for name, summary in summaries(results)
    ]
    if rows:
        document.heading("The chosen configurations")
        header = (
            "task,start,variant,median,mean,deviation,best,worst,median seed,learning rate,batch,epochs,grid x seeds"
        )
        document.table(header.split(","), rows)


def _add_replicates(document: Document, results: Results) -> None:
    header, rows = replicates_table(results)
    if rows:
        document.heading("Replicates")
        document.table(header, rows)
        document.paragraph(
            f"Every metric over the {len(results['seeds'])} seeds of the chosen configuration, x 100, at the epoch that"
            " scores: the best seed, the mean, the sample standard deviation and the median. A best seed is chosen on"
            " the split that it is reported on."
        )


def _add_variants(document: Document, results: Results) -> None:
    header, rows = variants_table(results)
    if rows:
        document.heading("Variants")
        document.table(header, rows)
        document.paragraph(
            "The chosen configuration (learning rate · batch · epochs) of each variant, over its seeds: the metric that"
            " selects, x 100, and medians of time and memory. An epoch: its training alone. Speed: training rows a"
            " second relative to the task's first variant. Optimizer: the memory of its state; peak: of the GPU."
        )


def _add_overfitting(document: Document, results: Results) -> None:
    """What overfits in a sentence on the chosen configurations, and in a table on all."""
    if all(len(trial["epochs"]) == 1 for trial in results["trials"]):
        return
    document.heading("Overfitting")
    document.paragraph(
        "A run overfits where its validation loss rises while its training loss falls: from the epoch after its lowest"
        " validation loss on, if that is not the last epoch and training loss has fallen since. The metric may rise all"
        " the same."
    )
    if sentence := overfitting_sentence(results):
        document.paragraph(f"The chosen configurations: {sentence}.")
    header, rows = overfitting_table(results)
    if rows:
        document.table(header, rows)
        document.paragraph(
            "Of the seeds that overfit, medians at the epoch with the lowest validation loss and after the last one;"
            " chosen configurations have a star."
        )


def _add_times(document: Document, results: Results) -> None:
    if not results["trials"]:
        return
    document.heading("Time")
    document.table(*times_table(results))
    document.paragraph(
        "Time: the sum of the trials' own time, training and evaluation, not what a clock on the wall shows where"
        " several workers run. Seconds and rows a second: medians over the trials and their epochs. An epoch is its"
        " training alone, an evaluation that of the development rows after it."
    )


def _add_rows(document: Document, results: Results) -> None:
    document.heading("Rows")
    rows = [
        [
            facts["title"],
            _row_count(facts["rows"]["train"]),
            ", ".join(_row_count(facts["rows"][split]) for split in facts["evaluation_splits"]),
            f"{facts['tokens_per_row']:.1f}",
        ]
        for facts in results["task_facts"].values()
    ]
    document.table(["task", "training rows", "development rows", "tokens a training row"], rows)


def _row_count(rows: Mapping[str, int | None]) -> str:
    return f"{rows['used']:,}" if rows["official"] is None else f"{rows['used']:,} of {rows['official']:,}"


def _add_failures(document: Document, results: Results) -> None:
    if results["failures"]:
        document.heading("Failed trials")
        document.table(*failures_table(results))


def _add_protocol(document: Document, results: Results) -> None:
    document.heading("How it was run")
    protocol = results["protocol"]
    facts = {
        "Model": f"{results['model']}, SHA-256 of the weights {results['model_sha256']}",
        "Seeds": ", ".join(map(str, results["seeds"])) + ": they decide the head, the order of the rows, and dropout",
        "Input": f"at most {protocol['max_seq_length']} tokens a row, longer ones are cut",
        "Optimizer and precision": "; ".join(results["variants"]),
        "Training": _training(protocol),
        "Score": f"of the {protocol['score_epoch']} epoch, on the development split",
    }
    if trials := results["trials"]:
        devices = Counter(trial["device"] for trial in trials)
        finished = sorted(trial["finished_at"] for trial in trials)
        facts["Devices"] = ", ".join(f"{device} ({number(count, 'trial')})" for device, count in devices.items())
        facts["Finished"] = f"first trial {finished[0]}, last trial {finished[-1]}"
        facts["Versions"] = _versions(trials)
    document.facts(facts)


_COURSES: Final = {
    "linear": "then falling linearly to 0",
    "cosine": "then falling along a cosine to 0",
    "constant": "then constant",
}


def _training(protocol: Mapping[str, Any]) -> str:
    steps = protocol["warmup_steps"]
    share = f"{100 * protocol['warmup_proportion']:g} % of the steps" if steps is None else number(steps, "step")
    accumulated = protocol["gradient_accumulation_steps"]
    facts = [
        f"weight decay {protocol['weight_decay']:g}",
        f"learning rate rising over the first {share}, {_COURSES[protocol['lr_schedule']]}",
        f"gradients clipped to a norm of {protocol['max_gradient_norm']:g}",
        f"a step's rows in {accumulated} parts" if accumulated > 1 else "",
        f"at most {number(protocol['max_steps'], 'step')}" if protocol["max_steps"] else "",
        f"evaluated every {number(protocol['eval_steps'], 'step')} too" if protocol["eval_steps"] else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def _versions(trials: Sequence[Mapping[str, Any]]) -> str:
    """Each library with its version, or all of them where trials had different ones."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        for library, version in trial["versions"].items():
            found[library][version] = None
    return ", ".join(f"{library} {' and '.join(versions)}" for library, versions in found.items())


def _pretraining_caption(pretraining: Mapping[str, Any]) -> str:
    budget = pretraining.get("time_budget_seconds")
    loss = pretraining.get("validation_loss")
    facts = [
        f"{pretraining['elapsed_seconds']:,.0f} s" + (f" of a budget of {budget:,.0f} s" if budget else ""),
        f"{pretraining['steps']:,} steps, {pretraining['sequences']:,} sequences",
        f"final validation loss {loss:.3f}" if loss is not None else "no validation",
        f"on {pretraining['hardware']}",
    ]
    return f"Pretraining: {'; '.join(facts)}."
