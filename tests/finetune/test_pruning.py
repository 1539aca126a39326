"""Which heads go, decided by the data, and what is left of a model, its folder and its report."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedModel

import finetune.pruning_rounds
from common.errors import UserError
from finetune.batches import DeviceSplit
from finetune.classifier import load_classifier
from finetune.examples import read_split, read_task
from finetune.heads import PRUNED_HEADS_FILE, kept_heads, read_pruned_heads
from finetune.kept_models import KeptModels, kept_folder
from finetune.model import Encoder
from finetune.model_record import ModelRecord, read_record, write_record
from finetune.prune import PruneConfig, prune
from finetune.pruning import (
    choose_heads,
    head_importance,
    hold_out,
    largest,
    measure_speed,
    removal_order,
    score_of,
)
from finetune.tasks import TASKS
from finetune.tokens import TokenizedSplit, load_tokens, select_rows, tokenize_split
from finetune.trial import Cell, Protocol, run_trial

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TASK = TASKS["sst2"]
CELL = Cell("sst2", 3e-3, 8, 6, "pretrained", seed=1)
PROTOCOL = Protocol(max_seq_length=32, weight_decay=0.1, warmup_proportion=0.06)
CONFIG = PruneConfig(num_seeds=2, seed=7, tolerance=20.0, holdout=0.25, rounds=2, num_epochs=2)
HEAD_SIZE = 8


@pytest.fixture(scope="module")
def tokens(glue_dir: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizedSplit]:
    tokenizer, cache = AutoTokenizer.from_pretrained(model_folder), tmp_path_factory.mktemp("cache")
    return {
        split: load_tokens(tokenize_split(examples, TASK, tokenizer, "words", 32, cache))
        for split, examples in read_task(TASK, glue_dir).items()
    }


@pytest.fixture(scope="module")
def tuned(model_folder: Path, tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned classifier of two layers with four heads each, and its record."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tuned") / "hf"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    data = {split: DeviceSplit(part, CPU) for split, part in tokens.items()}
    result, classifier = run_trial(TASK, CELL, PROTOCOL, Encoder(base), data, CPU)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = ModelRecord(
        base_model="base",
        base_model_path=str(base),
        task_name="sst2",
        own_task=None,
        max_seq_length=32,
        rows={split: len(part) for split, part in tokens.items()},
        cell=dataclasses.asdict(CELL),
        protocol=dataclasses.asdict(PROTOCOL),
        score=result["score"],
        metric="accuracy",
        metrics=result["epochs"][-1]["metrics"],
        epochs=result["epochs"],
        seconds=result["seconds"],
        device="cpu",
        versions={},
    )
    write_record(folder, record)
    return folder


@pytest.fixture(scope="module")
def pruned(tuned: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "O"
    prune(CONFIG, str(tuned), folder, glue_dir, with_full_size=True)
    return folder


def rows_of(split: TokenizedSplit) -> list[tuple]:
    return [
        (tuple(split.input_ids[start:end]), tuple(split.token_type_ids[start:end]), label)
        for start, end, label in zip(split.offsets[:-1], split.offsets[1:], split.labels, strict=True)
    ]


def scaled(model: PreTrainedModel, layer: int, head: int, factor: float) -> PreTrainedModel:
    """The model with one head's output times ``factor``, which the output projection's columns do as well."""
    model = copy.deepcopy(model)
    weight = model.get_parameter(f"bert.encoder.layer.{layer}.attention.output.dense.weight")
    weight.data[:, HEAD_SIZE * head : HEAD_SIZE * (head + 1)] *= factor
    return model


def losses(model: PreTrainedModel, split: TokenizedSplit) -> np.ndarray:
    """Of every row alone, float64 [rows]."""
    found = []
    for start, end, label in zip(split.offsets[:-1], split.offsets[1:], split.labels, strict=True):
        ids = torch.tensor(np.asarray(split.input_ids[start:end]), dtype=torch.long)[None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        found.append(-logits.log_softmax(-1)[0, int(label)].item())
    return np.array(found)


def test_selected_rows_are_these_rows(tokens: dict[str, TokenizedSplit]):
    all_rows, places = rows_of(tokens["train"]), np.array([5, 0, 47, 6])
    assert rows_of(select_rows(tokens["train"], places)) == [all_rows[place] for place in places]


def test_held_out_rows_are_a_seeded_share_and_the_others_are_trained_on(tokens: dict[str, TokenizedSplit]):
    training, held_out = hold_out(tokens["train"], 0.25, seed=3)
    assert (len(training), len(held_out)) == (36, 12)
    assert sorted(rows_of(training) + rows_of(held_out)) == sorted(rows_of(tokens["train"]))
    assert rows_of(hold_out(tokens["train"], 0.25, seed=3)[1]) == rows_of(held_out)
    assert rows_of(hold_out(tokens["train"], 0.25, seed=4)[1]) != rows_of(held_out)


def test_importance_is_the_mean_absolute_derivative_of_each_rows_loss(tuned: Path, tokens):
    model, split = load_classifier(tuned).double(), select_rows(tokens["train"], np.arange(20))
    step = 1e-5
    expected = np.zeros((2, 4))
    for layer, head in np.ndindex(2, 4):
        above, below = (losses(scaled(model, layer, head, 1 + sign * step), split) for sign in (1, -1))
        expected[layer, head] = np.abs((above - below) / (2 * step)).mean()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    importance = head_importance(load_classifier(tuned), DeviceSplit(split, CPU))
    found = [[importance[layer][head] for head in range(4)] for layer in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_heads_go_in_the_order_of_importance_and_each_layers_most_important_stays():
    importance = {0: {0: 0.1, 2: 0.9, 3: 0.4}, 1: {0: 0.3, 1: 0.2}, 2: {3: 0.01}}
    assert removal_order(importance) == [(0, 0), (1, 1), (0, 3)]


@pytest.mark.parametrize("limit", range(8))
def test_bisection_finds_what_a_scan_finds(limit: int):
    asked = []
    assert largest(7, lambda number: asked.append(number) or number <= limit) == limit
    assert len(asked) <= 3


def test_one_head_more_would_cost_too_much(tuned: Path, tokens):
    model = load_classifier(tuned)
    training, held_out = DeviceSplit(tokens["dev"], CPU), DeviceSplit(tokens["train"], CPU)
    order = removal_order(head_importance(model, training))
    costs, silenced = [0.0], model
    for layer, head in order:
        silenced = scaled(silenced, layer, head, 0.0)
        costs.append(100 * (score_of(model, TASK, held_out) - score_of(silenced, TASK, held_out)))
    numbers = set()
    for tolerance in [0.0, 100.0, *(cost for cost in costs if cost > 0)]:
        choice = choose_heads(model, TASK, training, held_out, tolerance)
        heads = [(layer, head) for layer, there in choice.heads.items() for head in there]
        assert sorted(heads) == sorted(order[: len(heads)])
        assert costs[len(heads)] <= tolerance + 1e-9
        assert len(heads) == len(order) or costs[len(heads) + 1] > tolerance + 1e-9
        numbers.add(len(heads))
    assert len(order) == 6 in numbers
    assert len(numbers) >= 3, "or the tolerance makes no difference here"
    assert sum(map(len, kept_heads(model).values())) == 8, "the model is left as it was"


def test_every_shape_is_timed_whatever_the_model_lacks_already(pruned: Path, tuned: Path, tokens):
    data, removed = DeviceSplit(tokens["dev"], CPU), read_pruned_heads(pruned)
    speeds = measure_speed(load_classifier(pruned), [removed, removed], data)
    assert speeds[0] == speeds[1]
    assert all(speed > 0 for speed in speeds[0].values())
    assert len(measure_speed(load_classifier(tuned), [{}, removed], data)) == 2


def test_a_pruned_folder_is_smaller_in_every_respect_and_holds_what_the_results_say(
    pruned: Path, tuned: Path, glue_dir: Path
):
    results = json.loads((pruned / "results.json").read_text())
    before, after = load_classifier(tuned), load_classifier(pruned)
    last = results["seeds"][str(results["median_seed"])][-1]
    assert last["num_heads"] == sum(map(len, kept_heads(after).values())) < results["before"]["num_heads"] == 8
    assert last["parameters"] == after.num_parameters() < before.num_parameters() == results["before"]["parameters"]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (pruned, tuned)]
    assert sizes == [last["file_bytes"], results["before"]["file_bytes"]]
    assert sizes[0] < sizes[1]
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    dev = read_split(TASK, "dev", glue_dir)
    encoded = tokenizer(dev.sentences[0], padding=True, return_tensors="pt")
    with torch.inference_mode():
        outputs = [model.eval()(**encoded).logits for model in (before, after)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert accuracy_score(dev.labels, outputs[1].argmax(-1)) == pytest.approx(last["score"])
    assert accuracy_score(dev.labels, outputs[0].argmax(-1)) == pytest.approx(results["before"]["score"])


def test_the_full_size_export_gives_stock_transformers_equal_outputs(pruned: Path):
    stock = AutoModelForSequenceClassification.from_pretrained(pruned / "full_size")
    ids = torch.arange(5, 20)[None]
    with torch.inference_mode():
        outputs = [model.eval()(input_ids=ids).logits for model in (stock, load_classifier(pruned))]
    torch.testing.assert_close(*outputs)
    assert not (pruned / "full_size" / PRUNED_HEADS_FILE).exists()
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(pruned)


def test_the_record_tells_the_last_fine_tuning_and_the_report_each_seed(pruned: Path):
    record, results = read_record(pruned), json.loads((pruned / "results.json").read_text())
    last = results["seeds"][str(results["median_seed"])][-1]
    assert record.task is TASK
    assert (record.rows["train"], last["training_rows"], record.rows["dev"]) == (48, 36, 16), "a quarter is held out"
    assert (record.score, record.cell["seed"], record.cell["num_epochs"]) == (last["score"], results["median_seed"], 2)
    assert len(record.epochs) == 2
    report = (pruned / "report.md").read_text()
    assert all(f"seed {seed}, round 1" in report for seed in (7, 8))
    assert "tuned on these rows too" in report
    assert (pruned / "report.html").read_text().count("<img") == 4


def test_a_grids_model_of_a_pruned_start_is_whole(pruned: Path, tmp_path: Path):
    classifier = Encoder(pruned).new_classifier(TASKS["mnli"], "pretrained", CPU)
    cell = dataclasses.replace(CELL, task_name="mnli")
    models, tokenizer = KeptModels(tmp_path, [cell]), AutoTokenizer.from_pretrained(pruned)
    with models.locked():
        models.keep(cell, {cell: 0.5}, classifier, tokenizer, read_record(pruned))
    kept = load_classifier(kept_folder(tmp_path, cell))
    assert kept.config.num_labels == 3
    assert kept_heads(kept) == kept_heads(load_classifier(pruned))


def test_a_killed_pruning_continues_and_finds_the_same(
    pruned: Path, tuned: Path, glue_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trials = []

    def interrupted(*arguments):
        trials.append(arguments[1].seed)
        assert len(arguments[4]["train"]) == 36, "held-out rows are not trained on"
        if len(trials) == 2:
            raise KeyboardInterrupt
        return run_trial(*arguments)

    monkeypatch.setattr(finetune.pruning_rounds, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(CONFIG, str(tuned), tmp_path / "O", glue_dir)
    assert not (tmp_path / "O" / "model.safetensors").exists()
    prune(CONFIG, str(tuned), tmp_path / "O", glue_dir)
    results = json.loads((pruned / "results.json").read_text())
    assert len(trials) == 1 + sum(map(len, results["seeds"].values())), "what was finished is not done again"
    again = json.loads((tmp_path / "O" / "results.json").read_text())
    for seed, states in results["seeds"].items():
        assert [state["removed"] for state in again["seeds"][seed]] == [state["removed"] for state in states]
    weights = [load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "O")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_development_split_decides_nothing(pruned: Path, tuned: Path, glue_dir: Path, tmp_path: Path):
    shutil.copytree(glue_dir, tmp_path / "glue")
    dev = tmp_path / "glue" / "SST-2" / "dev.tsv"
    header, *rows = dev.read_text().splitlines()
    flipped = [f"{row[:-1]}{1 - int(row[-1])}" for row in rows]
    dev.write_text("\n".join([header, *flipped]) + "\n")
    prune(CONFIG, str(tuned), tmp_path / "O", tmp_path / "glue")
    results, others = (json.loads((folder / "results.json").read_text()) for folder in (pruned, tmp_path / "O"))
    assert others["before"]["score"] == pytest.approx(1 - results["before"]["score"])
    for seed, states in results["seeds"].items():
        assert [state["removed"] for state in others["seeds"][seed]] == [state["removed"] for state in states]
        for name, loss in [(epoch["epoch"], epoch["train_loss"]) for epoch in states[-1]["epochs"]]:
            assert others["seeds"][seed][-1]["epochs"][name - 1]["train_loss"] == loss


def test_nothing_is_removed_where_every_head_counts(tuned: Path, glue_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("finetune.pruning.largest", lambda most, is_possible: 0)
    prune(dataclasses.replace(CONFIG, num_seeds=1), str(tuned), tmp_path / "O", glue_dir)
    assert "Nothing was removed" in (tmp_path / "O" / "report.md").read_text()
    assert not (tmp_path / "O" / PRUNED_HEADS_FILE).exists()
    weights = [load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "O")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_seeds", 0),
        ("seed", -1),
        ("rounds", 0),
        ("tolerance", -1.0),
        ("tolerance", float("nan")),
        ("holdout", 0.0),
        ("holdout", 1.0),
        ("learning_rate", 0.0),
        ("num_epochs", 0),
        ("batch_size", -1),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        PruneConfig(**{name: value})


def test_what_cannot_be_pruned_is_refused_before_anything_is_written(tuned: Path, glue_dir: Path, tmp_path: Path):
    def refusal(change, config: PruneConfig = CONFIG) -> str:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tuned, folder)
        change(folder)
        with pytest.raises(UserError) as error:
            prune(config, str(folder), tmp_path / "O", glue_dir)
        assert not (tmp_path / "O").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    def set_config(**values):
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **values}))

        return change

    assert "finetuning.json" in refusal(lambda folder: (folder / "finetuning.json").unlink())
    assert "quantised" in refusal(set_config(quantization_config={"quant_method": "torchao"}))
    assert "one attention head" in refusal(set_config(num_attention_heads=1))
    assert "holdout" in refusal(lambda folder: None, dataclasses.replace(CONFIG, holdout=0.001))
    if not torch.cuda.is_available():
        assert "fp16" in refusal(lambda folder: None, dataclasses.replace(CONFIG, precision="fp16"))


def test_a_folder_of_another_pruning_is_refused(pruned: Path, tuned: Path, glue_dir: Path):
    with pytest.raises(UserError, match="another configuration"):
        prune(dataclasses.replace(CONFIG, tolerance=2.0), str(tuned), pruned, glue_dir)
