"""Continued pretraining starts with exactly the weights of the folder it is given, or says in a line why it can't."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from common.errors import UserError
from data_prep.shards import Manifest, read_manifest
from pretrain.architecture import ModelConfig
from pretrain.init_from import load_pretrained, resolve_from
from pretrain.model import MaskedLanguageModel

SIZES = {
    "vocab_size": 800,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "type_vocab_size": 2,
}
MASKED_LM = {"bert": BertForMaskedLM, "megatron-bert": MegatronBertForMaskedLM}
PRETRAINING = {"bert": BertForPreTraining, "megatron-bert": MegatronBertForPreTraining}
ENCODER = {"bert": BertModel, "megatron-bert": MegatronBertModel}
CONFIG = {"bert": BertConfig, "megatron-bert": MegatronBertConfig}


@pytest.fixture(scope="module")
def manifest(data_dir) -> Manifest:
    return read_manifest(data_dir)


def random_weights(classes: dict[str, type[PreTrainedModel]], model_type: str = "bert", **changes) -> PreTrainedModel:
    torch.manual_seed(3)
    model = classes[model_type](CONFIG[model_type](**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, manifest: Manifest, **options) -> Path:
    """A folder as people have it: the model and its tokenizer, the data's here."""
    model.save_pretrained(folder, **options)
    shutil.copytree(manifest.tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def bert_folder(manifest, tmp_path) -> Path:
    return save(random_weights(MASKED_LM), tmp_path / "bert", manifest)


def start_from(folder: Path, manifest: Manifest, config: ModelConfig | None = None) -> tuple[MaskedLanguageModel, str]:
    torch.manual_seed(7)
    model = MaskedLanguageModel(resolve_from(str(folder), manifest, config or ModelConfig()))
    return model, load_pretrained(model, str(folder))


def input_rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(1, 800, (2, 20), generator=torch.Generator().manual_seed(0)), torch.tensor([20, 20])


def assert_same_logits(model: MaskedLanguageModel, reference: PreTrainedModel) -> None:
    input_ids, sequence_length = input_rows()
    with torch.no_grad():
        ours = model.eval().predict(model.encode(input_ids, sequence_length), torch.arange(40))[:, :800]
        theirs = reference(input_ids=input_ids)
    logits = theirs.prediction_logits if "prediction_logits" in theirs else theirs.logits
    torch.testing.assert_close(ours, logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MASKED_LM)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "sharded"])
def test_a_masked_language_model_goes_on_where_it_was(model_type, options, manifest, tmp_path) -> None:
    reference = random_weights(MASKED_LM, model_type)
    folder = save(reference, tmp_path / "model", manifest, **options)
    assert bool(options) == (folder / "model.safetensors.index.json").exists()
    model, line = start_from(folder, manifest)
    assert_same_logits(model, reference)
    assert "fresh" not in line


@pytest.mark.parametrize("model_type", PRETRAINING)
def test_the_next_sentence_head_is_left_behind(model_type, manifest, tmp_path) -> None:
    reference = random_weights(PRETRAINING, model_type)
    model, line = start_from(save(reference, tmp_path / "model", manifest), manifest)
    assert_same_logits(model, reference)
    assert "fresh" not in line


def test_the_oldest_file_format_and_names(manifest, tmp_path) -> None:
    """Pickled by torch, LayerNorms called gamma and beta, positions kept, as in the first checkpoints on the hub."""
    reference = random_weights(PRETRAINING)
    old_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {"bert.embeddings.position_ids": torch.arange(70)[None]}
    for name, tensor in reference.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        weights[name] = tensor
    del weights["cls.predictions.decoder.weight"], weights["cls.predictions.decoder.bias"]
    folder = save(reference, tmp_path / "model", manifest)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same_logits(start_from(folder, manifest)[0], reference)


def test_half_precision_weights_are_widened(manifest, tmp_path) -> None:
    reference = random_weights(MASKED_LM).bfloat16()
    model, _ = start_from(save(reference, tmp_path / "model", manifest), manifest)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_same_logits(model, reference.float())


@pytest.mark.parametrize("model_type", ENCODER)
def test_a_head_that_is_not_there_starts_fresh(model_type, manifest, tmp_path) -> None:
    reference = random_weights(ENCODER, model_type)
    model, line = start_from(save(reference, tmp_path / "model", manifest), manifest)
    assert "no masked language modelling head, which starts fresh" in line
    assert "\n" not in line
    input_ids, sequence_length = input_rows()
    with torch.no_grad():
        hidden = model.eval().encode(input_ids, sequence_length)
        torch.testing.assert_close(hidden, reference(input_ids=input_ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.manual_seed(7)
    fresh = MaskedLanguageModel(model.architecture).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]) == name.startswith("head."), name


def test_random_state_stays_as_it_was(bert_folder, manifest) -> None:
    model = MaskedLanguageModel(resolve_from(str(bert_folder), manifest, ModelConfig()))
    before = torch.get_rng_state()
    load_pretrained(model, str(bert_folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_come_from_the_folder_and_dropout_from_the_user(bert_folder, manifest) -> None:
    architecture = resolve_from(str(bert_folder), manifest, ModelConfig(hidden_dropout_prob=0.3))
    assert architecture.layer_norm == "post_ln"
    assert architecture.hidden_dropout_prob == 0.3
    assert {name: getattr(architecture, name) for name in SIZES} == SIZES
    assert architecture.layer_norm_eps == 1e-12


def test_a_vocabulary_that_was_padded_by_its_trainer(manifest, tmp_path) -> None:
    """As in Megatron's checkpoints: more rows than the tokenizer has tokens."""
    reference = random_weights(MASKED_LM, vocab_size=832)
    model, _ = start_from(save(reference, tmp_path / "model", manifest), manifest)
    input_ids, sequence_length = input_rows()
    with torch.no_grad():
        ours = model.eval().predict(model.encode(input_ids, sequence_length), torch.arange(40))
    torch.testing.assert_close(ours, reference(input_ids=input_ids).logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    weights = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file, {"format": "pt"})


def another_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    first, second = '"the": ', '"and": '
    assert first in text
    assert second in text
    file.write_text(text.replace(first, '"#": ').replace(second, first).replace('"#": ', second), encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


class Intruder:
    """What a pickled file could run."""

    def __reduce__(self) -> tuple:
        return print, ("intruded",)


def pickled_program(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Intruder()}, folder / "pytorch_model.bin")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "no folder": (shutil.rmtree, "neither a folder here nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "config cut": (lambda f: truncate(f / "config.json"), "config.json does not load"),
    "config of other types": (lambda f: change_config(f, hidden_size="wide"), "config.json does not load"),
    "weights cut": (lambda f: truncate(f / "model.safetensors"), "weights do not load"),
    "tokenizer cut": (lambda f: truncate(f / "tokenizer.json"), "tokenizer"),
    "a program": (pickled_program, "weights do not load"),
    "activation": (lambda f: change_config(f, hidden_act="relu"), "hidden_act 'relu'"),
    "approximate gelu": (lambda f: change_config(f, hidden_act="gelu_new"), "hidden_act 'gelu_new'"),
    "positions": (lambda f: change_config(f, position_embedding_type="relative_key"), "relative positions"),
    "decoder": (lambda f: change_config(f, is_decoder=True), "decoder"),
    "cross-attention": (lambda f: change_config(f, add_cross_attention=True), "decoder"),
    "pad id": (lambda f: change_config(f, pad_token_id=3), "pad_token_id 3"),
    "short": (lambda f: change_config(f, max_position_embeddings=32), "positions for 32 tokens"),
    "vocabulary": (another_vocabulary, "another vocabulary"),
    "sizes": (lambda f: change_config(f, intermediate_size=48), "config.json says [48"),
    "heads": (lambda f: change_config(f, num_attention_heads=3), "(16) is not a multiple"),
    "NaN": (
        lambda f: change_weights(f, bert__encoder__layer__0__output__dense__bias=torch.full((16,), torch.nan)),
        "not finite",
    ),
    "a layer lost": (lambda f: change_weights(f, bert__encoder__layer__1__output__dense__bias=None), "lacks 1 of its"),
    "half a head": (lambda f: change_weights(f, cls__predictions__transform__dense__bias=None), "lacks 1 of its"),
    "untied": (lambda f: change_weights(f, cls__predictions__decoder__weight=torch.ones(800, 16)), "not tied"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_can_not_be_trained_on_is_told_in_one_line(damage, bert_folder, manifest, capsys, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    change, words = DAMAGE[damage]
    change(bert_folder)
    with pytest.raises(UserError) as refusal:
        start_from(bert_folder, manifest)
    assert words in str(refusal.value)
    assert str(bert_folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "intruded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vocab_size", "words"), [(799, "vocabulary of 799 tokens, the data one of 800"), (832, "of 832 tokens")]
)
def test_without_a_tokenizer_the_sizes_have_to_agree(vocab_size, words, manifest, tmp_path) -> None:
    folder = save(random_weights(MASKED_LM, vocab_size=vocab_size), tmp_path / "model", manifest)
    no_tokenizer(folder)
    with pytest.raises(UserError, match=words):
        start_from(folder, manifest)


def test_without_a_tokenizer_equal_sizes_do(bert_folder, manifest) -> None:
    no_tokenizer(bert_folder)
    assert_same_logits(start_from(bert_folder, manifest)[0], random_weights(MASKED_LM))


def test_another_kind_of_model(manifest, tmp_path) -> None:
    RobertaForMaskedLM(RobertaConfig(**SIZES)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match="type 'roberta': only bert and megatron-bert"):
        start_from(tmp_path / "roberta", manifest)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"hidden_size": 32}, "hidden_size 16, model has 32"),
        ({"preset": "bert-tiny"}, "hidden_size 16, model has 128"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-12, model has 1e-05"),
        ({"max_position_embeddings": 64}, "max_position_embeddings 70, model has 64"),
    ],
)
def test_a_wish_that_contradicts_the_folder(wish, words, bert_folder, manifest) -> None:
    with pytest.raises(UserError, match=words):
        resolve_from(str(bert_folder), manifest, ModelConfig(**wish))


def test_a_wish_for_another_layer_norm(manifest, tmp_path) -> None:
    folder = save(random_weights(MASKED_LM, "megatron-bert"), tmp_path / "model", manifest)
    with pytest.raises(UserError, match="layer_norm pre_ln, model has post_ln"):
        resolve_from(str(folder), manifest, ModelConfig(layer_norm="post_ln"))


def test_a_hub_id_that_is_not_there(manifest, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is neither a folder here nor a model"):
        resolve_from("nobody/nothing", manifest, ModelConfig())
