"""Pruned models compute what Hugging Face's own model computes with the same heads silenced."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    MegatronBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

from common.errors import UserError
from finetune.heads import (
    PRUNED_HEADS_FILE,
    full_size,
    kept_heads,
    read_pruned_heads,
    remove_heads,
    removed_heads,
    write_pruned_heads,
)
from finetune.model import Encoder, check_model, read_classifier
from finetune.tasks import TASKS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "bert": BertConfig,
    "megatron-bert": MegatronBertConfig,
    "roberta": RobertaConfig,
    "electra": ElectraConfig,
}
HEADS = {0: [1, 2], 1: [3]}
CPU = torch.device("cpu")


def classifier_of(family: str, vocab_size: int = 50) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[family](vocab_size=vocab_size, max_position_embeddings=40, initializer_range=0.3, **SIZES)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for name, parameter in model.named_parameters():  # biases start as zeros, which no mistake would show in
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def silenced(model: PreTrainedModel, heads: dict[int, list[int]]) -> PreTrainedModel:
    """The model with zeros where the attention's output projection takes the heads' outputs: 8 columns each."""
    model = copy.deepcopy(model)
    for layer, gone in heads.items():
        for head in gone:
            name = f"encoder.layer.{layer}.attention.output.dense.weight"
            model.base_model.get_parameter(name).data[:, 8 * head : 8 * head + 8] = 0
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": torch.randint(5, 50, (3, 12), generator=generator), "attention_mask": mask}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs()).logits


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_pruned_heads(folder, model)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_removed_heads_are_as_if_their_outputs_were_zero(family: str):
    model = classifier_of(family).double()
    expected = logits(silenced(model, HEADS))
    assert (logits(model) - expected).abs().max() > 1e-3, "or the test can't fail"
    before = model.num_parameters()
    remove_heads(model, HEADS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert before - model.num_parameters() == 3 * (4 * 32 * 8 + 3 * 8)


def test_a_second_removal_counts_heads_as_in_the_unpruned_model():
    model = classifier_of("bert").double()
    expected = logits(silenced(model, {0: [0, 1, 2], 1: [3]}))
    remove_heads(model, HEADS)
    remove_heads(model, {0: [0]})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert kept_heads(model) == {0: [3], 1: [0, 1, 2]}
    assert removed_heads(model) == {0: [0, 1, 2], 1: [3]}


@pytest.mark.parametrize("heads", [{0: [0, 1, 2, 3]}, {0: [4]}, {2: [0]}, {0: [1, 1]}])
def test_a_layer_keeps_a_head_and_only_heads_that_are_there_are_removed(heads: dict[int, list[int]]):
    model = classifier_of("bert")
    before = logits(model)
    with pytest.raises(ValueError, match="layer"):
        remove_heads(model, {1: [0], **heads})
    assert torch.equal(logits(model), before), "nothing has been removed of the others either"


def test_another_family_is_refused():
    model = AutoModelForSequenceClassification.from_config(
        DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    )
    with pytest.raises(UserError, match="distilbert"):
        remove_heads(model, {0: [0]})


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_pruned_model_loads_here_and_fails_elsewhere(family: str, tmp_path: Path):
    model = classifier_of(family)
    remove_heads(model, HEADS)
    remove_heads(model, {0: [0]})
    folder = save(model, tmp_path / "pruned")
    loaded, missing = read_classifier(folder)
    assert not missing
    assert torch.equal(logits(loaded), logits(model))
    assert kept_heads(loaded) == kept_heads(model)
    record = json.loads((folder / PRUNED_HEADS_FILE).read_text())
    assert record["heads"] == [4, 4]
    assert record["removed"] == {"0": [0, 1, 2], "1": [3]}
    assert record["history"] == [{"0": [1, 2], "1": [3]}, {"0": [0]}]
    assert read_pruned_heads(folder) == removed_heads(loaded)
    for stock in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises((RuntimeError, ValueError)):
            stock.from_pretrained(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_full_size_export_gives_stock_transformers_equal_outputs(family: str, tmp_path: Path):
    model = classifier_of(family).double()
    remove_heads(model, HEADS)
    whole = full_size(model)
    whole.save_pretrained(tmp_path / "whole")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-12)
    assert stock.num_parameters() == classifier_of(family).num_parameters()


def test_an_unpruned_model_has_no_record(tmp_path: Path):
    folder = save(classifier_of("bert"), tmp_path / "whole")
    assert not (folder / PRUNED_HEADS_FILE).exists()
    assert read_pruned_heads(folder) == {}


@pytest.mark.parametrize(
    "record", ["{", "{}", "[]", '{"history": [{"0": "x"}]}', '{"history": [{"0": [7]}]}', '{"history": [{"9": [0]}]}']
)
def test_a_damaged_record_is_told_in_one_line(record: str, tmp_path: Path):
    model = classifier_of("bert")
    remove_heads(model, HEADS)
    folder = save(model, tmp_path / "pruned")
    (folder / PRUNED_HEADS_FILE).write_text(record)
    with pytest.raises(UserError, match=PRUNED_HEADS_FILE) as error:
        read_classifier(folder)
    assert "\n" not in str(error.value)


def test_a_lost_record_is_told_in_one_line(tmp_path: Path):
    model = classifier_of("bert")
    remove_heads(model, HEADS)
    folder = save(model, tmp_path / "pruned")
    (folder / PRUNED_HEADS_FILE).unlink()
    with pytest.raises(UserError, match="does not load") as error:
        read_classifier(folder)
    assert "\n" not in str(error.value)


def test_trials_start_from_a_pruned_folder_as_it_is(model_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = classifier_of("bert", len(tokenizer))
    remove_heads(model, HEADS)
    folder = save(model, tmp_path / "pruned")
    check_model(folder, tokenizer, 32)
    saved = load_file(folder / "model.safetensors")
    for initialization, is_pretrained in (("pretrained", True), ("random", False)):
        started = Encoder(folder).new_classifier(TASKS["mnli"], initialization, CPU)
        assert kept_heads(started) == kept_heads(model)
        name = "bert.encoder.layer.0.attention.self.query.weight"
        assert torch.equal(started.get_parameter(name), saved[name]) == is_pretrained
        assert started.config.num_labels == 3


def test_a_quantised_folder_is_refused(model_folder: Path, tmp_path: Path):
    folder = save(classifier_of("bert"), tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(UserError, match="quantised"):
        Encoder(folder)
