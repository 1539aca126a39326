import json
import re
from pathlib import Path

import pytest

from finetune.plots import scores_figure
from finetune.report import write_report
from finetune.results import Results, collect_results, summarize
from finetune.study import TrialStore
from finetune.tasks import TASKS
from finetune.trial import Cell

# Three seeds; learning rate 2e-5 has the highest single score, 3e-5 the highest median.
SCORES = {1e-5: (0.50, 0.52, 0.54), 2e-5: (0.10, 0.55, 0.99), 3e-5: (0.60, 0.58, 0.70)}


def grid(task_name: str, initialization="pretrained") -> list[Cell]:
    return [Cell(task_name, rate, 32, 3, initialization, seed) for rate in SCORES for seed in (1, 2, 3)]


def score(cell: Cell, penalty: float = 0.0) -> float:
    return SCORES[cell.learning_rate][cell.seed - 1] - (penalty if cell.initialization == "random" else 0.0)


def make_results(folder: Path, task_names: list[str], penalty: float = 0.3, failing: int = 0) -> Results:
    """Results of a grid with a random baseline ``penalty`` lower; the first ``failing`` trials fail twice."""
    store = TrialStore(f"sqlite:///{folder / 'trials.db'}", folder / "claim.lock")
    cells = {name: [*grid(name), *grid(name, "random")] for name in task_names}
    for name in task_names:
        store.open_study(name, {}, {"model": "run/hf", "rows": {"train": 4463, "dev": 277}})
        store.enqueue_missing(name, cells[name])
    failed = {cell for name in task_names for cell in cells[name][:failing]}
    while claimed := store.claim(task_names, "worker 0"):
        if claimed.cell in failed:
            store.fail(claimed, "RuntimeError: out of <memory>")
        else:
            store.finish(claimed, {"score": score(claimed.cell, penalty), "epochs": []})
    return collect_results(store, cells)


def report(folder: Path, results: Results) -> tuple[str, str]:
    write_report(folder, results)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_best_configuration_has_the_highest_median_not_the_highest_score():
    cells = grid("rte")
    summary = summarize(cells, {cell: score(cell) for cell in cells})
    assert summary["best"] == {"learning_rate": 3e-5, "batch_size": 32, "num_epochs": 3}
    assert (summary["median"], summary["max"], summary["min"]) == (0.60, 0.70, 0.58)
    assert summary["mean"] == pytest.approx(1.88 / 3)
    assert summary["std"] == pytest.approx(0.0642910050732864)  # of the sample: n - 1
    assert summary["num_configurations"] == 3


def test_a_missing_cell_leaves_no_median_even_in_another_configuration():
    cells = grid("rte")
    assert summarize(cells, {cell: score(cell) for cell in cells[1:]}) is None
    assert summarize([], {}) is None


def test_results_are_plain_json_with_every_trial(tmp_path: Path):
    results = make_results(tmp_path, ["rte"])
    assert json.loads(json.dumps(results)) == results
    assert len(results["trials"]) == 18
    assert results["missing"] == results["failures"] == []
    assert results["tasks"]["rte"]["random_baseline"]["median"] == pytest.approx(0.3)
    assert results["tasks"]["rte"]["rows"]["train"] == {"used": 4463, "official": 2490}


def test_the_table_tells_medians_scatter_and_gain(tmp_path: Path):
    markdown, page = report(tmp_path, make_results(tmp_path, ["rte"]))
    for text in ("60.0 ± 6.4", "30.0 ± 6.4", "+30.0", "3 x 3", "4,463 of 2,490", "Not the official rows"):
        assert text in markdown
        assert text in page
    assert "(no gain)" not in markdown


def test_a_difference_within_the_seeds_scatter_is_called_no_gain(tmp_path: Path):
    markdown, _ = report(tmp_path, make_results(tmp_path, ["rte"], penalty=0.06))
    assert "+6.0 (no gain)" in markdown


def test_failed_trials_are_named_and_their_task_has_no_median(tmp_path: Path):
    results = make_results(tmp_path, ["rte", "wnli"], failing=1)
    assert [(cell["task_name"], cell["seed"], cell["cause"]) for cell in results["missing"]] == [
        (name, 1, "RuntimeError: out of <memory>") for name in ("rte", "wnli")
    ]
    assert results["tasks"] == {}
    markdown, page = report(tmp_path, results)
    assert "without a median: RTE, WNLI (2 trials missing)" in markdown
    assert "out of &lt;memory&gt;" in page
    assert "±" not in markdown.split("Development split")[0]


def test_synthetic_scores_are_never_called_glue_and_never_stand_beside_published_ones(tmp_path: Path):
    markdown, page = report(tmp_path, make_results(tmp_path, ["demo_sentiment"]))
    assert "Synthetic demo benchmark (not GLUE)" in markdown
    assert "GLUE" not in markdown.replace("(not GLUE)", "")
    assert "Published" not in page


def test_glue_and_synthetic_tasks_have_tables_of_their_own(tmp_path: Path):
    markdown, _ = report(tmp_path, make_results(tmp_path, ["rte", "demo_sentiment"]))
    headers = [line for line in markdown.splitlines() if "(accuracy)" in line]
    assert headers == ["|  | RTE (accuracy) |", "|  | demo sentiment (accuracy) |"]
    assert markdown.index("## GLUE, development set") < markdown.index("## Synthetic demo benchmark (not GLUE)")


def test_test_and_development_scores_are_never_in_one_table(tmp_path: Path):
    markdown, _ = report(tmp_path, make_results(tmp_path, ["rte"]))
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert not ("24hBERT" in table and "run/hf" in table)
    assert "## Published, test set" in markdown


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path):
    (tmp_path / "pretraining.json").write_text(json.dumps(PRETRAINING))
    _, page = report(tmp_path, make_results(tmp_path, ["rte"]))
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(references) == 2, "two embedded plots"
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)


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


def test_pretraining_is_plotted_when_the_model_tells_of_it(tmp_path: Path):
    results = make_results(tmp_path, ["rte"])
    assert "Pretraining" not in report(tmp_path, results)[0]
    (tmp_path / "pretraining.json").write_text(json.dumps(PRETRAINING))
    markdown, _ = report(tmp_path, results)
    assert "90 s of a budget of 90 s; 120 steps, 15,360 sequences; final validation loss 3.250" in markdown
    assert (tmp_path / "pretraining.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 7])
def test_every_task_has_a_panel_and_no_panel_is_empty(num_tasks: int):
    names = list(TASKS)[:num_tasks]
    cell = {"learning_rate": 1e-4, "batch_size": 32, "num_epochs": 3, "initialization": "pretrained", "score": 0.5}
    figure = scores_figure([{"task_name": name, **cell} for name in names])
    assert len(figure.axes) == num_tasks
    assert all(axes.get_title(loc="left") for axes in figure.axes)
