"""The report on a search, from runs made by hand, against figures worked out here."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.search_config import Hyperband, Range, SearchConfig
from pretrain.search_plots import curves_figure, importance_figure, value_panels
from pretrain.search_report import write_report
from pretrain.search_results import Results, make_results
from tests.pretrain.made_search import BUDGET, CONFIG, FACTS, RUNS, SPACE, reference, run


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_report(CONFIG, FACTS, RUNS, [reference()], folder, price_per_gpu_hour=1000.0)
    return folder


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Each section's tables together, a row as {column: cell}."""
    found: dict[str, list[dict[str, str]]] = {}
    for section in re.split(r"^## ", (folder / "report.md").read_text(), flags=re.MULTILINE)[1:]:
        for table in re.findall(r"(?:^\|.*\n?)+", section, flags=re.MULTILINE):
            header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
            rows = [dict(zip(header, row, strict=True)) for row in rows]
            found.setdefault(section.splitlines()[0], []).extend(rows)
    return found


def results(**fields: Any) -> Results:
    return make_results(**{"config": CONFIG, "facts": FACTS, "runs": RUNS, "references": [reference()], **fields})


def test_the_best_are_listed_by_loss_and_references_below_them(report: Path) -> None:
    rows = tables(report)["Best configurations"]
    found = [[row[name] for name in ("run", "validation loss", "train batch size", "learning rate")] for row in rows]
    assert found == [
        ["1. run 001", "2.0000", "32", "1e-3"],
        ["2. run 000", "2.2500", "32", "5e-4"],
        ["bert-base-settings", "3.5000", "256", "1e-4"],
    ]
    assert rows[0]["perplexity"] == "7.39"


def test_the_outcome_is_one_sentence_that_names_the_best_run_and_all_states(report: Path) -> None:
    text = (report / "report.md").read_text().split("\n\n")[1]
    assert text == (
        "The lowest final validation loss is 2.0000 (perplexity 7.39), of run 001: train batch size 32, learning rate"
        " 1e-3. Of 8 runs of 100s: 2 finished, 2 dropped, 1 diverged, 1 running, 1 paused,"
        " 1 waiting."
    )
    assert "The search is under way" in (report / "report.md").read_text()


def test_rungs_values_and_hours_are_those_of_the_results(report: Path) -> None:
    found = tables(report)
    counts = {"reached": "7", "kept": "6", "dropped": "1", "open": "0"}
    assert found["Who was dropped where"][0] == {"rung": "25s: below 6.0", **counts}
    batch = {row["value"]: row for row in found["Final loss by value"]}["train batch size 32"]
    assert [batch[name] for name in ("finished runs", "median loss", "lowest loss")] == ["2", "2.1250", "2.0000"]
    hours = {row["runs"]: row for row in found["Hours and cost"]}
    assert (hours["finished"]["number"], hours["finished"]["cost"]) == ("2", "133.33")  # 2 x 240 s x 1000 / 3600
    assert (hours["total"]["number"], hours["total"]["cost"]) == ("8", "272.22")
    assert "failed" not in hours


def test_every_run_is_listed_with_its_end(report: Path) -> None:
    rows = tables(report)["All runs"]
    assert [row["run"] for row in rows] == [f"{number:03d}" for number in range(8)]
    assert [row["loss at 50s"] for row in rows] == ["3.0000", "2.9000", "3.1000", "-", "3.3000", "4.0000", "-", "-"]
    assert [row["loss"] for row in rows][-4:] == ["3.3000", "4.0000", "5.8000", "-"]
    assert rows[5]["because"] == "rank 6 of 6 at 50s"


def test_the_page_holds_its_images_and_refers_to_nothing_outside(report: Path) -> None:
    page = (report / "report.html").read_text()
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(references) == 2 + 1 + 1  # a panel for each hyperparameter, the curves, the importance
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert {path.name for path in report.glob("*.png")} == {"values.png", "curves.png", "importance.png"}
    assert set(re.findall(r"\]\((\S+\.png)\)", (report / "report.md").read_text())) == {
        "values.png",
        "curves.png",
        "importance.png",
    }


def test_all_of_it_is_told_from_the_results_that_lie_beside_it(report: Path) -> None:
    assert json.loads((report / "results.json").read_text()) == results()


def ended(config: SearchConfig, *rates: float) -> list:
    """Runs of these learning rates, all finished."""
    parameters = [{"optimizer.learning_rate": rate} for rate in rates]
    return [
        run(number, "finished", 5.0, 3.0, 2.5, 2.0, config=config, parameters=values, final_loss=2.0 + number)
        for number, values in enumerate(parameters)
    ]


RANGE = SearchConfig(BUDGET, {"optimizer.learning_rate": Range(1e-4, 1e-2, True)}, sampler="tpe", num_runs=3)
ONE = SearchConfig(BUDGET, {"train_batch_size": [32]})
HYPERBAND = replace(RANGE, hyperband=Hyperband())
STEPS = SearchConfig(
    PretrainConfig(time_budget=None, max_steps=40, validation_interval="25%", checkpoint_interval="25%",
                   early_validation_interval=None), {"train_batch_size": [32, 64]})  # fmt: skip


@pytest.mark.parametrize(
    ("config", "runs", "told"),
    [
        (CONFIG, [], "No run has finished yet"),
        (CONFIG, [run(number, "waiting") for number in range(8)], "8 waiting"),
        (CONFIG, RUNS[3:], "No run has finished yet"),
        (ONE, [run(0, "finished", 5.0, config=ONE, final_loss=4.0)], "Of 1 run of 100s: 1 finished."),
        (RANGE, ended(RANGE, 1e-3, 5e-4, 1.2345e-3), "learning rate: 1e-4 to 0.01, log"),
        (HYPERBAND, [*ended(HYPERBAND, 1e-3), replace(ended(HYPERBAND, 2e-3)[0], number=1, state="dropped",
                     elapsed_seconds=30.0, final_loss=None)], "Hyperband dropped 1 of 2 runs, after 30 %"),
        (STEPS, [run(0, "finished", config=STEPS, curve=((20, 4.0), (40, 3.0)), steps=40, final_loss=3.0)],
         "Budget of a run:** 40 steps"),
    ],
)  # fmt: skip
def test_a_search_of_any_kind_and_at_any_stage_has_a_report(tmp_path, config, runs, told: str, monkeypatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, buffer, **_: buffer.write(PNG))
    write_report(config, {**FACTS, "importance": {}}, runs, [], tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert told in markdown
    assert "Importance" not in markdown
    assert "Cost: " not in markdown


def png() -> bytes:
    """A white point: the drawings' content has tests of its own."""
    import io

    import numpy as np
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.ones((1, 1, 4)), format="png")
    return buffer.getvalue()


PNG = png()


def test_the_papers_own_rows_stand_apart_where_its_space_was_searched(report: Path, tmp_path: Path) -> None:
    assert "Published" not in tables(report)
    space = {**SPACE, "warmup_proportion": [0.06], "schedule_length": [None]}
    write_report(SearchConfig(BUDGET, space), FACTS, [], [], tmp_path)
    rows = tables(tmp_path)["Published"]
    assert [row["validation loss"] for row in rows] == ["1.717", "1.717", "1.720", "1.722", "1.723", "2.050", "2.318"]
    assert "not comparable" in (tmp_path / "report.md").read_text()


def test_what_is_no_price_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="price_per_gpu_hour must be at least 0, not -1"):
        write_report(CONFIG, FACTS, RUNS, [], tmp_path, price_per_gpu_hour=-1.0)
    assert not list(tmp_path.iterdir())


def offsets(collection: Any) -> list[float]:
    return [float(y) for _, y in collection.get_offsets()]


def test_figure_1_has_a_point_for_each_finished_run_and_a_stroke_at_each_median() -> None:
    axes = value_panels(results())["train batch size"].axes[0]
    points, stroke, none = axes.collections
    assert offsets(points) == [2.0, 2.25]
    assert {float(y) for _, y in stroke.get_segments()[0]} == {2.125}
    assert offsets(none) == []
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32\n(2)", "64\n(0)"]


def test_figure_1_of_a_range_is_a_scatter_over_its_values() -> None:
    axes = value_panels(results(config=RANGE, runs=ended(RANGE, 1e-3, 5e-4)))["learning rate"].axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[5e-4, 3.0], [1e-3, 2.0]]
    assert (axes.get_xscale(), axes.get_xlim()) == ("log", (1e-4, 1e-2))


def lines(axes: Any) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axes.lines]


def test_figure_2_has_every_curve_names_the_best_and_marks_where_runs_were_dropped() -> None:
    whole, half = curves_figure(results()).axes
    drawn = lines(whole)
    for entry in results()["runs"][:7] + results()["references"]:
        assert [loss for _, loss in entry["curve"]] in drawn
    labels = whole.get_legend_handles_labels()[1]
    assert "001: 2.000 (32 · 1e-3)" in labels
    assert "bert-base-settings: 3.500" in labels
    marks = {(line.get_marker(), float(line.get_xdata()[0]), float(line.get_ydata()[0]))
             for line in whole.lines if len(line.get_xdata()) == 1}  # fmt: skip
    assert {("|", 25.0, 6.5), ("|", 50.0, 4.0), ("x", 25.0, 5.8)} <= marks
    assert [text.get_text() for text in whole.texts] == ["25s: below 6.0", "50s: top 50 %"]
    low, high = half.get_ylim()  # of the better one of two: 2.9, 2.6, 2.0 from 50 s on
    assert low == pytest.approx(2.0 - 0.05 * 0.9)
    assert high == pytest.approx(2.9 + 0.05 * 0.9)
    assert half.get_xlim()[0] == 50.0


def test_a_diverged_run_does_not_stretch_figure_2() -> None:
    runs = [*RUNS[:2], run(6, "diverged", 9e5, rung_losses={})]
    whole, _ = curves_figure(results(runs=runs, references=[])).axes
    top = whole.get_ylim()[1]
    assert top == pytest.approx(1.03 * 5.0)
    assert any(line.get_marker() == "x" and line.get_ydata() == [top] for line in whole.lines if line.get_xdata())


def test_importance_is_shown_with_the_largest_share_on_top() -> None:
    axes = importance_figure(results()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["train batch size", "learning rate"]
    assert [bar.get_width() for bar in axes.patches] == [25.0, 75.0]


def test_without_a_validation_there_are_no_figures() -> None:
    empty = results(runs=[run(0, "waiting")], references=[], facts={**FACTS, "importance": {}})
    assert (value_panels(empty), curves_figure(empty), importance_figure(empty)) == ({}, None, None)
