"""Encoders of other families go the same way."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from common.errors import UserError
from finetune.batches import DeviceSplit
from finetune.examples import read_task
from finetune.model import Encoder, check_model, load_tokenizer
from finetune.tasks import TASKS
from finetune.tokens import load_tokens, tokenize_split
from finetune.trial import Cell, Protocol, run_trial

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "roberta": (RobertaForMaskedLM, RobertaConfig, {**SIZES, "max_position_embeddings": 34, "pad_token_id": 0}),
    "megatron-bert": (MegatronBertForMaskedLM, MegatronBertConfig, {**SIZES, "max_position_embeddings": 32}),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, {**SIZES, "max_position_embeddings": 32}),
    "distilbert": (DistilBertForMaskedLM, DistilBertConfig, {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
}


def make_model(family: str, model_folder: Path, folder: Path) -> Path:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_folder)
    model_class, config_class, settings = FAMILIES[family]
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), **{**special, **settings})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_starts_from_its_weights_and_is_trained(
    family: str, model_folder: Path, glue_dir: Path, tmp_path: Path
):
    folder = make_model(family, model_folder, tmp_path / "hf")
    tokenizer, task = load_tokenizer(folder), TASKS["sst2"]
    check_model(folder, tokenizer, 32)
    data = {
        split: DeviceSplit(
            load_tokens(tokenize_split(examples, task, tokenizer, family, 32, tmp_path)), torch.device("cpu")
        )
        for split, examples in read_task(task, glue_dir).items()
    }
    encoder = Encoder(folder)
    cell, protocol = Cell("sst2", 1e-3, 16, 1, "pretrained", 1), Protocol(32, 0.1, 0.06)
    before = encoder.new_classifier(task, "pretrained", torch.device("cpu")).state_dict()
    result, classifier = run_trial(task, cell, protocol, encoder, data, torch.device("cpu"))
    assert 0 <= result["score"] <= 1
    changed = [name for name, weight in classifier.state_dict().items() if not torch.equal(weight, before[name])]
    assert any("layer" in name for name in changed)
    if family == "modernbert":
        pretrained = ModernBertForMaskedLM.from_pretrained(folder).head.dense.weight
        assert torch.equal(before["head.dense.weight"], pretrained), "as Hugging Face's own classifier starts"


def test_rows_longer_than_a_model_can_take_are_refused_before_any_work(model_folder: Path, tmp_path: Path):
    folder = make_model("roberta", model_folder, tmp_path / "hf")
    with pytest.raises(UserError, match="can't take max_seq_length 34"):
        check_model(folder, load_tokenizer(folder), 34)  # 34 positions, of which 32 can be used


def test_a_tokenizer_without_padding_is_refused(model_folder: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        check_model(folder, tokenizer, 32)


def test_what_classifies_is_drawn_anew_even_if_the_folder_has_one(model_folder: Path, tmp_path: Path):
    config = BertConfig.from_pretrained(model_folder)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "hf")
    device, task = torch.device("cpu"), TASKS["sst2"]
    torch.manual_seed(1)
    tuned = Encoder(tmp_path / "hf").new_classifier(task, "pretrained", device)
    tuned.save_pretrained(tmp_path / "tuned")
    torch.manual_seed(2)
    again = Encoder(tmp_path / "tuned").new_classifier(task, "mnli", device)
    assert not torch.equal(again.classifier.weight, tuned.classifier.weight)
    assert torch.equal(again.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)
