"""The report: what it says, that it says it of the right figures, and that its page stands alone."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.page import MarkdownPage, Page
from finetune.curves import chosen_panels
from finetune.plots import grid_panels, scores_panels
from finetune.report import add_content, write_report
from finetune.results import Results
from finetune.score_tables import latex_row, score_tables
from finetune.trial import Cell
from tests.finetune.made_results import (
    PROTOCOL,
    TABLE_3,
    glue_results,
    grid,
    results_of,
    table_trial,
    trial,
    with_baseline,
    with_variants,
)

BERT_BASE = TABLE_3["BERT-base"][:-1]
VOID_TAGS = {"meta", "img", "br"}


def markdown_of(results: Results) -> str:
    document = MarkdownPage("title")
    add_content(document, results)
    return document.text


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, the header first."""
    tables = []
    for text in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
        tables.append([header, *rows])
    return tables


def table_with(markdown: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table that has these columns."""
    for header, *rows in tables_of(markdown):
        if set(columns) <= set(header):
            return [dict(zip(header, row, strict=True)) for row in rows]
    raise AssertionError(f"no table has {columns}")


def test_the_table_tells_medians_scatter_and_gain():
    markdown = markdown_of(with_baseline("rte", rows={"rte": {"train": 463}}))
    rows = {row[""]: row["RTE (accuracy)"] for row in table_with(markdown, "RTE (accuracy)")}
    assert rows == {"run/hf": "60.0 ± 6.4", "random weights": "30.0 ± 6.4", "gain of pretraining": "+30.0"}
    assert "Not the official rows, so not GLUE scores: RTE: 463 of 2,490 training rows." in markdown


def test_a_difference_within_the_seeds_scatter_is_called_no_gain():
    assert "+6.0 (no gain)" in markdown_of(with_baseline("rte", penalty=0.06))


def test_the_chosen_configurations_tell_mean_best_worst_and_the_median_seed():
    (row,) = table_with(markdown_of(results_of({"rte": grid("rte")})), "median seed")
    expected = {
        "median": "60.0",
        "mean": "62.7",
        "deviation": "6.4",
        "best": "70.0",
        "worst": "58.0",
        "median seed": "1",
    }
    assert row.items() >= {**expected, "learning rate": "3e-5", "epochs": "2", "grid x seeds": "3 x 3"}.items()


def test_the_average_stands_beside_its_nine_columns():
    (row,) = table_with(markdown_of(glue_results(BERT_BASE)), "average", "MNLI-mm (accuracy)")
    assert row["average"] == "79.8"
    assert row["MNLI-m (accuracy)"] == "84.6 ± 0.0"
    assert row["MNLI-mm (accuracy)"] == "84.0 ± 0.0"
    assert list(row)[1:] == [
        *("MNLI-m (accuracy)", "MNLI-mm (accuracy)", "QNLI (accuracy)", "QQP (F1)", "RTE (accuracy)"),
        *("SST-2 (accuracy)", "MRPC (F1)", "CoLA (Matthews)", "STS-B (Spearman)", "average"),
    ]


def test_without_all_tasks_there_is_no_average_and_those_that_lack_are_named():
    results = results_of({name: grid(name) for name in ("rte", "mrpc", "cola", "stsb", "wnli", "sst2", "mnli")})
    markdown = markdown_of(results)
    assert "There is no median of QNLI and QQP." in markdown
    assert "average" not in score_tables(results)[0][1][0]


def test_starts_from_mnli_have_a_table_of_their_own():
    results = glue_results(BERT_BASE, lift=0.09)
    (plain_title, (header, (plain,))), (tuned_title, (_, (tuned,))) = score_tables(results)
    assert plain_title == "GLUE, development set: no task started from MNLI"
    assert tuned_title == "GLUE, development set: RTE, MRPC and STS-B started from MNLI"
    changed = [name for name, before, after in zip(header, plain, tuned, strict=True) if before != after]
    assert changed == ["RTE (accuracy)", "MRPC (F1)", "STS-B (Spearman)", "average"]
    assert (plain[header.index("RTE (accuracy)")], tuned[header.index("RTE (accuracy)")]) == (
        "69.1 ± 0.0",
        "78.1 ± 0.0",
    )
    assert (plain[-1], tuned[-1]) == ("79.8", "82.8")
    markdown = markdown_of(results)
    assert markdown.index(f"## {plain_title}") < markdown.index(f"## {tuned_title}")


def test_a_grid_that_only_starts_from_mnli_says_so():
    ((title, (_, rows)),) = score_tables(results_of({"rte": grid("rte", "mnli")}, mnli_init=True))
    assert title == "GLUE, development set: RTE started from MNLI"
    assert rows == [["run/hf", "70.0 ± 6.4"]]


def test_failed_trials_are_named_and_their_task_has_no_median():
    cells = {name: grid(name) for name in ("rte", "wnli")}
    lost, retried = cells["rte"][0], cells["wnli"][4]
    trials = {cell: table_trial(cell) for cell in cells["rte"] + cells["wnli"] if cell != lost}
    failures = [(lost, "RuntimeError: out of <memory>"), (lost, "RuntimeError: out of <memory>"), (retried, "NaN")]
    results = results_of(cells, trials, failures)
    document = Page("title")
    add_content(document, results)
    markdown = markdown_of(results)
    assert "without a median: RTE (1 trial missing)" in markdown
    assert [row["seeds"] for row in table_with(markdown, "seeds", "cause")] == ["1"]
    told = [(row["task"], row["seed"], row["then"]) for row in table_with(markdown, "then")]
    assert told == [("RTE", "1", "missing"), ("RTE", "1", "missing"), ("WNLI", "2", "succeeded")]
    assert "out of &lt;memory&gt;" in document.text
    assert not any("RTE (accuracy)" in table[0] for table in tables_of(markdown))


def test_a_grid_without_any_result_still_has_a_report(tmp_path: Path):
    write_report(tmp_path, results_of({"rte": grid("rte")}, trials={}))
    assert "without a median: RTE (9 trials missing)" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_synthetic_scores_are_never_called_glue_and_never_stand_beside_published_ones():
    results = with_baseline("demo_sentiment")
    markdown = markdown_of(results)
    assert results["benchmark"] == "Synthetic demo benchmark (not GLUE)"
    assert "GLUE" not in markdown
    assert "ublished" not in markdown


def test_glue_and_synthetic_tasks_have_tables_of_their_own():
    titles = [
        title for title, _ in score_tables(results_of({"rte": grid("rte"), "demo_sentiment": grid("demo_sentiment")}))
    ]
    assert titles == ["GLUE, development set", "Synthetic demo benchmark (not GLUE)"]


def test_published_figures_are_as_published_and_never_in_a_table_with_ours_or_of_another_split():
    markdown = markdown_of(glue_results(BERT_BASE))
    (test_server,) = [table for table in tables_of(markdown) if table[0][0] == "published, test"]
    (development,) = [table for table in tables_of(markdown) if table[0][0] == "published, development"]
    for row in test_server[1:]:
        matched, mismatched, *others = [f"{score:.1f}" for score in TABLE_3[row[0]]]
        assert row[1:] == [f"{matched}/{mismatched}", *others]
    fp32 = dict(zip(development[0], development[1], strict=True))
    # Hugging Face: CoLA 56.53, SST-2 92.32, MRPC F1/acc 88.85/84.07, STS-B P/S 88.64/88.48, QQP acc/F1 90.71/87.49
    assert (fp32["CoLA"], fp32["SST-2"], fp32["MRPC (F1/accuracy)"]) == ("56.53", "92.32", "88.85/84.07")
    assert (fp32["STS-B (Spearman/Pearson)"], fp32["QQP (F1/accuracy)"]) == ("88.48/88.64", "87.49/90.71")
    assert (fp32["MNLI-m/mm"], fp32["QNLI"], fp32["RTE"], fp32["WNLI"]) == ("83.91/84.10", "90.66", "65.70", "56.34")
    assert [row[0] for row in development[1:]] == [
        *("run_glue, fp32", "run_glue, fp16"),
        *("run_flax_glue, mean", "run_flax_glue, deviation", "run_flax_glue, best"),
    ]
    for table in tables_of(markdown):
        names = {row[0] for row in table}
        assert len(names & {"run/hf", "24hBERT", "run_glue, fp32"}) <= 1


def test_the_majority_of_wnli_is_told_where_wnli_is():
    markdown = markdown_of(results_of({"wnli": grid("wnli")}))
    assert "scores 56.3 on the development split and 65.1 on the test server" in markdown
    assert "WNLI (accuracy; majority 56.3)" in markdown
    assert "majority" not in markdown_of(results_of({"rte": grid("rte")}))


def test_times_are_sums_of_the_trials_own():
    cells = {"rte": grid("rte"), "cola": grid("cola", rates=(1e-5,))}
    rte, cola, total = table_with(markdown_of(results_of(cells)), "seconds a trial")
    assert (rte["seconds an epoch"], rte["seconds an evaluation"]) == ("4.0", "0.5")
    assert (rte["trials"], rte["time (minutes)"], rte["share"], rte["seconds a trial"]) == (
        "9",
        "1.88",
        "75.0 %",
        "12.5",
    )
    assert (cola["trials"], cola["share"], cola["training rows a second"]) == ("3", "25.0 %", "800")
    assert total["time (minutes)"] == "2.50"


def test_how_it_was_run_is_told():
    cells = grid("rte")
    trials = {cell: table_trial(cell) for cell in cells}
    trials[cells[0]].update(device="NVIDIA H200", versions={"torch": "2.12.0"}, finished_at="2026-02-01T09:00:00+00:00")
    protocol = {**PROTOCOL, "score_epoch": "best", "lr_schedule": "cosine", "warmup_steps": 100, "eval_steps": 50}
    markdown = markdown_of(results_of({"rte": cells}, trials, protocol=protocol))
    for text in (
        "- **Optimizer and precision:** AdamW, fp32",
        "- **Training:** weight decay 0.1, learning rate rising over the first 100 steps, then falling along a cosine"
        " to 0, gradients clipped to a norm of 1, evaluated every 50 steps too",
        "NVIDIA H200 (1 trial), cpu (8 trials)",
        "torch 2.12.0 and 2.11.0, transformers 5.3.0",
        "first trial 2026-02-01T09:00:00+00:00, last trial 2026-03-01T10:00:00+00:00",
        "abc123abc123",
        "The score is the best epoch's",
        "selected on the split that it is reported on",
    ):
        assert text in markdown


def test_all_is_told_from_results_alone_even_of_tasks_that_the_package_does_not_know():
    results = json.loads(json.dumps(with_baseline("demo_sentiment")).replace("demo_sentiment", "reviews"))
    results["task_facts"]["reviews"].update(title="Reviews", benchmark="Own tasks", synthetic=False)
    markdown = markdown_of(results)
    assert table_with(markdown, "Reviews (accuracy)")[0]["Reviews (accuracy)"] == "60.0 ± 6.4"
    assert "GLUE" not in markdown.replace(results["benchmark"], "")
    assert all(list(panels(results)) == ["Reviews"] for panels in (scores_panels, grid_panels, chosen_panels))


def test_a_latex_row_has_the_papers_columns_and_says_what_it_is():
    *comments, row = latex_row(glue_results(BERT_BASE)).splitlines()
    assert row == r"run/hf & 84.6/84.0 & 90.6 & 72.0 & 69.1 & 92.8 & 86.1 & 55.1 & 84.3 & 79.8 \\"
    assert all(comment.startswith("% ") for comment in comments)
    assert "development set" in comments[0]
    assert "median of 3 seeds" in comments[1]
    assert "RTE, MRPC, STS-B not started from MNLI" in comments[1]


def test_a_latex_row_has_dashes_where_a_score_is_missing_and_escapes_the_models_name():
    results = results_of({"rte": grid("rte")}, model="my_model & 100%", rows={"rte": {"train": 463}})
    *comments, row = latex_row(results).splitlines()
    assert row == r"my\_model \& 100\% & -- & -- & -- & 60.0 & -- & -- & -- & -- & -- \\"
    assert "% not the official rows: RTE: 463 of 2,490 training rows" in comments


def test_both_starts_have_a_latex_row_each_under_its_own_comment():
    text = latex_row(glue_results(BERT_BASE, lift=0.09))
    plain, tuned = [line for line in text.splitlines() if not line.startswith("%")]
    assert "& 69.1 &" in plain
    assert "& 78.1 &" in tuned
    assert text.index("not started from MNLI") < text.index(plain) < text.index("STS-B started from MNLI")


class Elements(HTMLParser):
    """Reads a page; whatever is not closed in the order in which it was opened is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables_outside_a_box = 0
        self.styles = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table" and self.open[-1] != "div":
            self.tables_outside_a_box += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data


PRETRAINING = {
    "time_budget_seconds": 90,
    "elapsed_seconds": 89.5,
    "steps": 120,
    "sequences": 15360,
    "validation_loss": 3.25,
    "stopped_by": "time_budget",
    "hardware": "2 CPU cores",
    "train": [{"elapsed_seconds": 10 * i, "step": i, "loss": 9.0 - i, "learning_rate": 1e-3} for i in range(1, 6)],
    "validation": [{"elapsed_seconds": 10 * i, "step": i, "loss": 9.1 - i} for i in (2, 5)],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every part: two starts, a failure, missing trials, pretraining, names that need escapes."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "pretraining.json").write_text(json.dumps(PRETRAINING))
    cells = {"rte": grid("rte") + grid("rte", "mnli"), "wnli": grid("wnli")}
    trials = {cell: table_trial(cell) for cell in cells["rte"] + cells["wnli"]}
    del trials[cells["wnli"][0]]
    failures = [(cells["wnli"][0], "<script src='https://example.org/x.js'> & url(http://example.org)")]
    write_report(folder, results_of(cells, trials, failures, model="a<b>&c", mnli_init="both"))
    return folder


def test_the_page_parses_and_refers_to_nothing_outside_itself(written: Path):
    page = (written / "report.html").read_text()
    elements = Elements(page)
    assert elements.open == []
    references = [value for _, name, value in elements.attributes if name in ("src", "href", "srcset", "action")]
    assert len(references) == 11, (
        "two tasks' scores, three grids, two chosen curves (WNLI has none), three of the others, pretraining"
    )
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in references)
    assert not re.search(r"@import|url\(", elements.styles)
    assert not {tag for tag, _, _ in elements.attributes} & {"script", "link", "iframe", "object"}


def test_the_page_fits_a_phone(written: Path):
    elements = Elements((written / "report.html").read_text())
    assert ("meta", "content", "width=device-width, initial-scale=1") in elements.attributes
    assert elements.tables_outside_a_box == 0
    assert "overflow-x: auto" in elements.styles
    assert "img { max-width: 100%" in elements.styles


def test_page_and_markdown_say_the_same(written: Path):
    markdown, page = (written / "report.md").read_text(), (written / "report.html").read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)).split())
    for table in tables_of(markdown):
        for cell in itertools.chain.from_iterable(table):
            escaped = cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;")
            assert escaped in text
    for heading in re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE):
        assert f"<h2>{heading}</h2>" in page


def test_figures_lie_beside_the_report(written: Path):
    names = re.findall(r"!\[.*\]\((.*)\)", (written / "report.md").read_text())
    assert names == ["scores.png", "grid.png", "curves.png", "other-curves.png", "pretraining.png"]
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_pretraining_is_told_when_the_model_tells_of_it(written: Path):
    markdown = (written / "report.md").read_text()
    assert "90 s of a budget of 90 s; 120 steps, 15,360 sequences; final validation loss 3.250" in markdown


def test_variants_are_compared_by_score_time_and_memory():
    rows = table_with(markdown_of(with_variants()), "speed")
    assert [(row["task"], row["variant"], row["speed"]) for row in rows] == [
        ("RTE", "AdamW, fp32", "1.00 x"),
        ("RTE", "AdamW, bf16", "2.50 x"),
        ("RTE", "AdamW, fp16", "0.25 x"),
    ]
    assert [(row["configuration"], row["best"], row["mean"]) for row in rows[:2]] == [
        ("3e-5 · 32 · 2", "70.0", "62.7"),
        ("1e-5 · 32 · 2", "54.0", "52.0"),
    ]
    assert {row["optimizer (MiB)"] for row in rows} == {"3.0"}
    assert {row["peak (MiB)"] for row in rows} == {"-"}


def test_with_one_variant_there_is_nothing_to_compare():
    assert "## Variants" not in markdown_of(results_of({"rte": grid("rte")}))


def test_a_page_says_whose_scores_stand_first():
    whose = "best configuration (AdamW, fp32; under Variants also AdamW, bf16; AdamW, fp16)"
    assert whose in markdown_of(with_variants())


def overfitted(cell: Cell, eval_losses: tuple[float, ...]) -> dict[str, Any]:
    result = trial(cell.task_name, *([0.5] * (len(eval_losses) - 1)), table_trial(cell)["score"])
    for epoch, loss in zip(result["epochs"], eval_losses, strict=True):
        epoch["eval_loss"] = loss
    return result


def test_overfitting_is_named_for_each_configuration():
    cells = grid("rte", rates=(2e-5, 3e-5))
    eval_losses = {1: (0.9, 0.5, 0.7, 0.8), 2: (0.5, 0.6, 0.7, 0.9), 3: (0.9, 0.8, 0.7, 0.6)}
    trials = {
        cell: overfitted(cell, eval_losses[cell.seed] if cell.learning_rate == 3e-5 else (4.0, 3.0, 2.0, 1.0))
        for cell in cells
    }
    markdown = markdown_of(results_of({"rte": cells}, trials))
    assert "RTE (3e-5 · 32 · 2): 2 of 3 seeds from epoch 2 to 3 on." in markdown
    (row,) = table_with(markdown, "seeds that overfit")
    assert (row["learning rate"], row["seeds that overfit"], row["from epoch"]) == ("3e-5 *", "2 of 3", "2 to 3")
    assert row["validation loss"] == "0.500 to 0.850"
    assert row["training loss"] == f"{(0.9 + 0.45) / 2:.3f} to {0.9 / 4:.3f}"


def test_that_nothing_overfits_is_told_too():
    markdown = markdown_of(results_of({"rte": grid("rte")}))
    assert "RTE (3e-5 · 32 · 2): none of 3." in markdown
    assert not any("seeds that overfit" in table[0] for table in tables_of(markdown))


def test_replicates_tell_best_mean_and_deviation_of_every_metric():
    rows = table_with(markdown_of(results_of({"mrpc": grid("mrpc")})), "best", "mean", "metric")
    assert [(row["metric"], row["best"], row["mean"], row["deviation"], row["median"]) for row in rows] == [
        ("F1 (selects)", "70.0", "62.7", "6.4", "60.0"),
        ("accuracy", "69.0", "61.7", "6.4", "59.0"),
    ]


def paper_cells() -> Iterator[Cell]:
    small = itertools.product(
        ("rte", "sst2", "mrpc", "cola", "stsb", "wnli"), (1e-5, 3e-5, 5e-5, 8e-5), (16, 32), (3, 5, 10)
    )
    large = itertools.product(("mnli", "qqp", "qnli"), (5e-5, 8e-5), (32,), (3, 5))
    for values in (*small, *large):
        yield from (Cell(*values, "pretrained", seed) for seed in range(1, 6))


@pytest.mark.slow
def test_the_papers_whole_grid_is_a_page_below_ten_megabytes(tmp_path: Path):
    cells: dict[str, list[Cell]] = {}
    for cell in paper_cells():
        cells.setdefault(cell.task_name, []).append(cell)
    trials = {
        cell: trial(cell.task_name, *(0.8 + 0.01 * math.sin(cell.seed * epoch) for epoch in range(cell.num_epochs)))
        for cell in itertools.chain.from_iterable(cells.values())
    }
    assert len(trials) == 780
    write_report(tmp_path, results_of(cells, trials))
    assert (tmp_path / "report.html").stat().st_size < 10e6
