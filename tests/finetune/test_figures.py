"""The report's figures: that they show the right trials."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from finetune.curves import chosen_panels, other_panels
from finetune.plots import grid_panels, rate_text, scores_panels
from finetune.tasks import TASKS
from tests.finetune.made_results import SCORES, grid, results_of, table_trial, with_baseline, with_variants


def test_every_seed_is_a_point_and_the_chosen_configuration_is_marked():
    (figure,) = scores_panels(results_of({"rte": grid("rte")})).values()
    (axes,) = figure.axes
    groups = [group for group in axes.collections if isinstance(group, PathCollection)]
    points = sorted(group.get_offsets()[:, 0].tolist() for group in groups)
    assert points == [pytest.approx([100 * score for score in scores]) for scores in sorted(SCORES.values())]
    assert all(len(set(group.get_offsets()[:, 1])) == 3 for group in groups), "equal scores would hide each other"
    labels = {label.get_text(): label.get_fontweight() for label in axes.get_yticklabels()}
    assert labels == {"1e-5 · 32 · 2": "normal", "2e-5 · 32 · 2": "normal", "3e-5 · 32 · 2": "bold"}


def test_every_task_with_trials_has_a_panel():
    names = list(TASKS)[:7]
    panels = scores_panels(results_of({name: grid(name, rates=(1e-5,)) for name in names}))
    assert list(panels) == [TASKS[name].title for name in names]


def test_the_heat_map_has_each_configurations_median_and_leaves_out_tasks_with_one():
    cells = {"rte": grid("rte") + grid("rte", "mnli"), "cola": grid("cola", rates=(1e-5,))}
    panels = grid_panels(results_of(cells, mnli_init="both"))
    assert list(panels) == ["RTE", "RTE from MNLI"]
    texts = [text.get_text() for text in panels["RTE"].axes[0].texts]
    assert texts == [f"{100 * np.median(SCORES[rate]):.1f}" for rate in sorted(SCORES)]


def test_a_configuration_without_all_its_seeds_has_no_median_in_the_heat_map():
    cells = grid("rte")
    trials = {cell: table_trial(cell) for cell in cells[1:]}
    (figure,) = grid_panels(results_of({"rte": cells}, trials)).values()
    assert [text.get_text() for text in figure.axes[0].texts] == ["none", "55.0", "60.0"]
    assert not figure.axes[0].patches, "no frame: nothing is chosen"


def test_learning_curves_are_those_of_the_chosen_configurations_seeds():
    (figure,) = chosen_panels(results_of({"rte": grid("rte")})).values()
    losses, scores = figure.axes
    thin = [list(line.get_ydata()) for line in scores.lines if line.get_linewidth() < 1]
    assert thin == [pytest.approx([100 * (score - 0.05), 100 * score]) for score in SCORES[3e-5]]
    (thick,) = [list(line.get_ydata()) for line in scores.lines if line.get_linewidth() > 1]
    assert thick == pytest.approx([55.0, 60.0])
    assert {line.get_label() for line in losses.lines if line.get_linewidth() > 1} == {
        "training loss",
        "validation loss",
    }
    assert losses.get_ylabel() == "loss (nats)"


def test_every_configuration_that_was_not_chosen_has_its_curves_random_weights_included():
    results = with_baseline("rte")
    panels = other_panels(results)
    assert list(panels) == ["RTE", "RTE from random weights"]
    titles = {
        name: [axes.get_title("left") for axes in panel.axes if axes.get_title("left")]
        for name, panel in panels.items()
    }
    assert titles == {
        "RTE": ["1e-5 · 32 · 2", "2e-5 · 32 · 2"],
        "RTE from random weights": ["1e-5 · 32 · 2", "2e-5 · 32 · 2", "3e-5 · 32 · 2"],
    }
    scores = panels["RTE"].axes[1]
    assert [list(line.get_ydata()) for line in scores.lines] == [
        pytest.approx([100 * (score - 0.05), 100 * score]) for score in SCORES[1e-5]
    ]


def test_a_task_without_a_chosen_configuration_has_all_its_curves():
    cells = grid("rte")
    results = results_of({"rte": cells}, {cell: table_trial(cell) for cell in cells[1:]})
    assert not chosen_panels(results)
    (panel,) = other_panels(results).values()
    assert len(panel.axes) == 2 * 3


def test_evaluations_between_epochs_are_points_of_the_curves():
    cells = grid("rte", rates=(1e-5,))
    trials = {cell: table_trial(cell) for cell in cells}
    metrics = {"dev": {"accuracy": 0.31}}
    for result in trials.values():
        result["evaluations"] = [
            {"step": 5, "epoch": 0.5, "train_loss": 1.2, "eval_loss": 1.4, "metrics": metrics},
            {"step": 15, "epoch": 1.5, "train_loss": 0.6, "eval_loss": 0.7, "metrics": metrics},
        ]
    ((losses, scores),) = [figure.axes for figure in chosen_panels(results_of({"rte": cells}, trials)).values()]
    seed = scores.lines[0]
    assert list(seed.get_xdata()) == [0.5, 1, 1.5, 2]
    assert list(seed.get_ydata())[::2] == pytest.approx([31, 31])
    points = [line for line in losses.lines if line.get_linestyle() == "None"]
    assert [list(line.get_ydata()) for line in points] == [[1.2, 0.6]] * 3
    lines = [list(line.get_xdata()) for line in losses.lines if line.get_linestyle() != "None"]
    assert lines == [[1, 2]] * 3 + [[0.5, 1, 1.5, 2]] * 3 + [[1, 2], [0.5, 1, 1.5, 2]]


def test_every_variant_has_figures_of_its_own():
    results = with_variants()
    titles = [*(f"RTE, {variant}" for variant in results["variants"]), "CoLA, AdamW, fp32"]
    assert list(scores_panels(results)) == list(chosen_panels(results)) == titles
    assert list(grid_panels(results)) == list(other_panels(results)) == titles[:3]
    bf16 = chosen_panels(results)["RTE, AdamW, bf16"].axes[0].get_title("left")
    assert bf16 == "RTE, AdamW, bf16\n1e-5 · 32 · 2", "its own best configuration"


@pytest.mark.parametrize(
    ("rate", "text"), [(5e-5, "5e-5"), (1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (0.1, "1e-1"), (1.0, "1e0")]
)
def test_learning_rates_are_short(rate: float, text: str):
    assert rate_text(rate) == text
