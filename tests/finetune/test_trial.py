from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finetune.batches import DeviceSplit
from finetune.inference import decide, predict
from finetune.losses import TrialFailure
from finetune.model import Encoder
from finetune.tasks import TASKS
from finetune.trial import Cell, Protocol, parameter_groups, run_trial

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROTOCOL = Protocol(max_seq_length=32, weight_decay=0.1, warmup_proportion=0.06)
Tasks = dict[str, dict[str, DeviceSplit]]


def cell(task_name="sst2", seed=1, num_epochs=2, initialization="pretrained", precision="fp32") -> Cell:
    return Cell(task_name, 3e-3, 8, num_epochs, initialization, seed, precision)


def figures(result: dict) -> list[dict]:
    """What the epochs brought, without their times."""
    return [{name: epoch[name] for name in epoch if "seconds" not in name} for epoch in result["epochs"]]


def train(cell: Cell, tasks: Tasks, encoder: Encoder, protocol: Protocol = PROTOCOL) -> tuple[dict, PreTrainedModel]:
    return run_trial(TASKS[cell.task_name], cell, protocol, encoder, tasks[cell.task_name], CPU)


def run(cell: Cell, tasks: Tasks, folder: Path, protocol: Protocol = PROTOCOL) -> dict:
    return train(cell, tasks, Encoder(folder), protocol)[0]


@pytest.mark.parametrize("initialization", ["pretrained", "random"])
def test_the_same_cell_gives_the_same_figures_and_another_seed_others(initialization, tasks, model_folder: Path):
    encoder = Encoder(model_folder)
    results = [train(cell(seed=seed, initialization=initialization), tasks, encoder)[0] for seed in (1, 2, 1)]
    epochs = [figures(result) for result in results]
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


def test_a_learnable_task_is_learned(tasks, model_folder: Path):
    result = run(cell(num_epochs=20), tasks, model_folder)
    assert result["score"] >= 0.9
    assert result["epochs"][-1]["train_loss"] < result["epochs"][0]["train_loss"] / 2


def test_scores_are_learned_by_regression(tasks, model_folder: Path):
    result = run(cell("stsb", num_epochs=40), tasks, model_folder)
    assert result["score"] == result["epochs"][-1]["metrics"]["dev"]["spearman"] > 0.6


def test_the_last_epochs_score_counts_and_each_epoch_is_recorded(tasks, model_folder: Path):
    result = run(cell(), tasks, model_folder)
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2]
    assert figures(result)[0].keys() == {"epoch", "train_loss", "eval_loss", "metrics"}
    times = [epoch["seconds"] + epoch["eval_seconds"] for epoch in result["epochs"]]
    assert 0 < sum(times) <= result["seconds"]
    assert result["score"] == result["epochs"][1]["metrics"]["dev"]["accuracy"]
    assert result["score_epoch_index"] == 1


def test_the_best_epoch_counts_if_the_protocol_says_so_and_the_model_is_that_epochs(tasks, model_folder: Path):
    encoder, many = Encoder(model_folder), cell(num_epochs=8)
    result, classifier = train(many, tasks, encoder, replace(PROTOCOL, score_epoch="best"))
    scores = [epoch["metrics"]["dev"]["accuracy"] for epoch in result["epochs"]]
    assert result["score"] == max(scores)
    assert result["score_epoch_index"] == scores.index(max(scores)) < 7, "an earlier epoch must be the best for this"
    assert figures(result) == figures(train(many, tasks, encoder)[0]), "what is trained is the same"
    logits, labels = predict(classifier, tasks["sst2"]["dev"])
    assert (decide(TASKS["sst2"], logits) == labels.numpy()).mean() == max(scores)


def test_half_precision_learns_too_and_keeps_float32_weights(tasks, model_folder: Path):
    result, classifier = train(cell(num_epochs=10, precision="bf16"), tasks, Encoder(model_folder))
    assert result["score"] >= 0.9
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert figures(result) != figures(run(cell(num_epochs=10), tasks, model_folder))


def test_pretrained_starts_from_the_folders_weights_and_random_from_none_of_them(model_folder: Path):
    encoder, saved = Encoder(model_folder), load_file(model_folder / "model.safetensors")
    torch.manual_seed(1)
    pretrained = encoder.new_classifier(TASKS["sst2"], "pretrained", CPU).state_dict()
    torch.manual_seed(1)
    random = encoder.new_classifier(TASKS["sst2"], "random", CPU).state_dict()
    # Only matrices tell: biases and LayerNorms start alike everywhere.
    encoder_matrices = [key for key in saved if key.startswith("bert.") and saved[key].ndim == 2]
    assert len(encoder_matrices) > 10
    assert all(torch.equal(pretrained[key], saved[key]) for key in encoder_matrices)
    assert not any(torch.equal(random[key], saved[key]) for key in encoder_matrices)


def test_the_seed_draws_the_head_and_training_leaves_the_pretrained_weights_alone(tasks, model_folder: Path):
    encoder = Encoder(model_folder)

    def head_and_embeddings(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        weights = encoder.new_classifier(TASKS["sst2"], "pretrained", CPU).state_dict()
        return [weights["classifier.weight"], weights["bert.embeddings.word_embeddings.weight"]]

    head, embeddings = head_and_embeddings(1)
    train(cell(), tasks, encoder)
    assert not torch.equal(head_and_embeddings(2)[0], head)
    assert all(torch.equal(*pair) for pair in zip(head_and_embeddings(1), (head, embeddings), strict=True))


def test_biases_and_layer_norms_do_not_decay(model_folder: Path):
    classifier = Encoder(model_folder).new_classifier(TASKS["sst2"], "random", CPU)
    decays = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(classifier, 0.1)
        for parameter in group["params"]
    }
    for name, parameter in classifier.named_parameters():
        spared = name.endswith("bias") or "LayerNorm" in name
        assert decays[id(parameter)] == (0.0 if spared else 0.1), name


def test_a_loss_that_is_no_number_fails_the_trial(tasks, model_folder: Path, tmp_path: Path):
    broken = tmp_path / "hf"
    broken.mkdir()
    for path in model_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrialFailure, match="training loss is nan"):
        run(cell(), tasks, broken)
