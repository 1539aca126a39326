"""What a card says, and that it says it of the right model."""

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from finetune.model_card import Subject, model_card
from finetune.trial import Cell
from tests.finetune.made_models import made_record
from tests.finetune.made_results import grid, results_of

CELL = Cell("mrpc", 3e-5, 32, 2, "pretrained", 1)


def subject(**changes: Any) -> Subject:
    labels = ("not_equivalent", "equivalent")
    return Subject(
        **{"repo_id": "me/x", "record": made_record(CELL), "labels": labels, "num_bytes": 2_000_000, **changes}
    )


def metadata(card: str) -> Mapping[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_hub_reads_this_models_scores_of_the_development_set():
    (result,) = metadata(model_card(subject(results=results_of({"mrpc": grid("mrpc")}))))["model-index"][0]["results"]
    assert result["dataset"] == {
        "name": "GLUE MRPC, development set",
        "type": "nyu-mll/glue",
        "config": "mrpc",
        "split": "validation",
    }
    assert result["metrics"] == [
        {"type": "f1", "value": 0.75, "name": "F1 (development set)"},
        {"type": "accuracy", "value": 0.74, "name": "accuracy (development set)"},
    ]


def test_other_rows_than_the_official_ones_are_never_called_glues():
    record = made_record(CELL, rows={"train": 100, "dev": 408})
    card = model_card(subject(record=record))
    assert "Not the official rows, so no GLUE score: 100 of 3,668 training rows." in card
    fewer = model_card(subject(record=made_record(CELL, rows={"train": 3668, "dev": 20})))
    name = metadata(fewer)["model-index"][0]["results"][0]["dataset"]["name"]
    assert name == "GLUE MRPC, development set (20 rows, not the official 408)"


def test_seeds_median_and_grid_are_told_where_the_run_tells_them():
    card = model_card(subject(results=results_of({"mrpc": grid("mrpc")})))
    assert "| dev | F1 | 75.0 | 60.0 | 62.7 | 6.4 | 70.0 |" in card
    assert "3 seeds of the configuration with the highest median; this model is the median seed's" in card
    assert "The best of 3 configurations was selected on the development set" in card
    assert "| seeds | 1, 2, 3 |" in card
    alone = model_card(subject())
    assert "| dev | F1 | 75.0 |\n" in alone
    assert "median" not in alone


def test_one_configuration_was_not_selected():
    assert "selected" not in model_card(subject(results=results_of({"mrpc": grid("mrpc", rates=(3e-5,))})))


def test_licence_and_base_model_are_named_only_where_they_are_known():
    assert not {"license", "base_model"} & metadata(model_card(subject())).keys()
    path = (
        "/home/someone/.cache/huggingface/hub/models--prajjwal1--bert-tiny/snapshots/6f75de8b60a9f8a2fdf7b69cbd86d9e64b"
    )
    record = made_record(CELL, base_model="prajjwal1/bert-tiny", base_model_path=path)
    card = model_card(subject(record=record, license="apache-2.0"))
    assert (metadata(card)["license"], metadata(card)["base_model"]) == ("apache-2.0", "prajjwal1/bert-tiny")
    assert "/home/" not in card


def test_labels_are_the_models_own_names():
    assert "Takes two texts and gives one of `not_equivalent`, `equivalent`" in model_card(subject())


def test_a_score_has_no_labels_and_is_given_as_it_is():
    card = model_card(subject(record=made_record(Cell("stsb", 3e-5, 32, 2, "pretrained", 1)), labels=("score",)))
    assert "Takes two texts and gives a score" in card
    assert 'function_to_apply="none"' in card
    assert [metric["type"] for metric in metadata(card)["model-index"][0]["results"][0]["metrics"]] == [
        "spearmanr",
        "pearsonr",
    ]


def test_a_pruned_model_is_not_said_to_load_in_transformers():
    card = model_card(subject(removed_heads={0: [1, 3], 2: [0]}))
    assert "from transformers" not in card
    assert "library_name" not in metadata(card)
    assert 'python -m finetune predict model "A text. | Another one."' in card
    assert "3 attention heads" in card
    assert "layer 0: 1, 3; layer 2: 0" in card


def test_a_quantised_model_says_what_it_needs():
    card = model_card(subject(is_quantized=True))
    assert "Needs `pip install torchao`." in card
    assert "int8" in metadata(card)["tags"]


def test_pretraining_is_told_with_its_budget_and_losses():
    pretraining = {
        "time_budget_seconds": 86400.0,
        "elapsed_seconds": 86399.5,
        "steps": 23000,
        "train": [{"step": 1, "loss": 9.0}, {"step": 23000, "loss": 1.75}],
        "validation": [{"step": 23000, "loss": 1.7}],
    }
    card = model_card(subject(pretraining=pretraining))
    for row in (
        "| time budget | 86,400.0 s (24.0 h) |",
        "| optimizer steps | 23,000 |",
        "| training loss | 1.7500 at step 23,000 |",
        "| validation loss | 1.7000 at step 23,000 |",
    ):
        assert row in card
    assert "Pretraining" not in model_card(subject())


@pytest.mark.parametrize(("losses", "overfits"), [((0.9, 0.5, 0.7), True), ((0.9, 0.7, 0.5), False)])
def test_overfitting_is_named(losses: tuple[float, ...], overfits: bool):
    epochs = [{**epoch, "eval_loss": loss} for epoch, loss in zip(made_record(CELL).epochs, losses, strict=True)]
    card = model_card(subject(record=made_record(CELL, epochs=epochs)))
    assert ("Overfits from epoch 3 on" in card) == overfits
