import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from common.errors import UserError
from finetune.classifier import load_classifier
from finetune.heads import remove_heads, write_pruned_heads
from tests.finetune.tuned_models import make_model


@pytest.fixture
def tuned(model_folder: Path, tmp_path: Path) -> Path:
    return make_model(tmp_path / "tuned", model_folder, ["bad", "good"], "sst2")


def logits(classifier: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return classifier(input_ids=torch.arange(20).view(2, 10)).logits


def test_a_classifier_comes_whole_in_float32_and_without_dropout(tuned: Path):
    AutoModelForSequenceClassification.from_pretrained(tuned).bfloat16().save_pretrained(tuned)
    classifier = load_classifier(tuned)
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert torch.equal(logits(classifier), logits(classifier))
    theirs = AutoModelForSequenceClassification.from_pretrained(tuned, dtype=torch.float32).eval()
    assert torch.equal(logits(classifier), logits(theirs))


def test_a_pruned_classifier_comes_with_its_smaller_layers(tuned: Path):
    classifier = load_classifier(tuned)
    remove_heads(classifier, {0: [0]})
    classifier.save_pretrained(tuned)
    write_pruned_heads(tuned, classifier)
    loaded = load_classifier(tuned)
    assert loaded.bert.encoder.layer[0].attention.self.query.weight.shape == (8, 16)
    assert torch.equal(logits(loaded), logits(classifier))


def test_a_pretrained_model_is_no_classifier(model_folder: Path):
    with pytest.raises(UserError, match="it is no classifier before it is fine-tuned"):
        load_classifier(model_folder)


def edit_weights(folder: Path, *lost: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in weights if name not in lost}, folder / "model.safetensors")


def test_what_is_not_whole_is_named(tuned: Path):
    edit_weights(tuned, "bert.pooler.dense.bias")
    with pytest.raises(UserError, match=r"lacks weights \(such as bert.pooler.dense.bias\)$"):
        load_classifier(tuned)
    (tuned / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not load"):
        load_classifier(tuned)
    (tuned / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UserError, match="does not load"):
        load_classifier(tuned)
    (tuned / "config.json").unlink()
    with pytest.raises(UserError, match="is not a Hugging Face folder"):
        load_classifier(tuned)
