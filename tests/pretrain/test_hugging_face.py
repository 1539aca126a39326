"""Our model is Hugging Face's, weight by weight, in both directions: logits, loss and every gradient."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM, PreTrainedModel

from pretrain.architecture import ModelConfig, resolve
from pretrain.hugging_face import (
    architecture_of,
    check_parity,
    from_hugging_face,
    hugging_face_config,
    hugging_face_names,
    to_hugging_face,
)
from pretrain.model import NO_LABEL, MaskedLanguageModel

VOCAB_SIZE = 101  # padded to 128 inside
LENGTH = 12
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-6,
}
THEIR_CLASSES = {"pre_ln": (MegatronBertConfig, MegatronBertForMaskedLM), "post_ln": (BertConfig, BertForMaskedLM)}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def scatter(model: torch.nn.Module, rows: int = VOCAB_SIZE) -> None:
    """Move every weight away from where it starts, so that no two could be mixed up unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            real = parameter[:rows] if len(parameter) > rows else parameter
            real += 0.2 * torch.randn_like(real)


def random_reference(layer_norm: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = THEIR_CLASSES[layer_norm]
    reference = model_class(config_class(**SIZES)).to(dtype)
    scatter(reference)
    return reference.eval()


def random_model(layer_norm: str, dtype: torch.dtype) -> MaskedLanguageModel:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    architecture = resolve(ModelConfig(layer_norm=layer_norm, **sizes), VOCAB_SIZE, LENGTH, pad_token_id=0)
    model = MaskedLanguageModel(architecture).to(dtype)
    scatter(model)
    return model.eval()


@pytest.fixture(params=["theirs to ours", "ours to theirs"])
def pair(request, layer_norm, dtype) -> tuple[MaskedLanguageModel, PreTrainedModel]:
    """The same weights in both models, made in one of them."""
    if request.param == "theirs to ours":
        reference = random_reference(layer_norm, dtype)
        return from_hugging_face(reference, architecture_of(reference.config)), reference
    model = random_model(layer_norm, dtype)
    return model, to_hugging_face(model)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 12, 7 and 3 tokens with four predictions; the last slot is unused."""
    torch.manual_seed(1)
    sequence_length = torch.tensor([LENGTH, 7, 3])
    input_ids = torch.randint(1, VOCAB_SIZE, (3, LENGTH))
    input_ids[torch.arange(LENGTH) >= sequence_length[:, None]] = 0
    return {
        "input_ids": input_ids,
        "sequence_length": sequence_length,
        "masked_lm_positions": torch.tensor([1, 5, LENGTH + 2, 2 * LENGTH + 1, 0]),
        "masked_lm_ids": torch.tensor([9, VOCAB_SIZE - 1, 55, 7, NO_LABEL]),
    }


def their_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = torch.full((3 * LENGTH,), NO_LABEL)
    used = batch["masked_lm_ids"] != NO_LABEL
    labels[batch["masked_lm_positions"][used]] = batch["masked_lm_ids"][used]
    attention_mask = torch.arange(LENGTH) < batch["sequence_length"][:, None]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": attention_mask.long(),
        "labels": labels.view(3, LENGTH),
    }


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layer_norm", THEIR_CLASSES)
def test_logits_loss_and_every_gradient_are_equal(pair, layer_norm, dtype, batch) -> None:
    model, reference = pair
    close = {"rtol": 0, "atol": TOLERANCES[dtype]}
    inputs = their_inputs(batch)
    expected = reference(**inputs)
    real = inputs["attention_mask"].bool()
    hidden = model.encode(batch["input_ids"], batch["sequence_length"])
    logits = model.predict(hidden, real.flatten().nonzero().squeeze(1))[:, :VOCAB_SIZE]
    torch.testing.assert_close(logits, expected.logits[real], **close)

    loss = model(**batch) / 4
    torch.testing.assert_close(loss, expected.loss, **close)
    loss.backward()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        theirs = [reference.get_parameter(their).grad for their in hugging_face_names(name, layer_norm)]
        if name == "embeddings.token_type.weight":  # ours reads token type 0 alone
            assert not theirs[0][1:].any()
        expected_gradient = torch.cat(theirs)
        assert expected_gradient.any(), f"{name}: nothing is compared"
        gradient = parameter.grad[: len(expected_gradient)]
        torch.testing.assert_close(gradient, expected_gradient, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert not parameter.grad[len(expected_gradient) :].any(), f"{name}: padding must not learn"


@pytest.mark.parametrize("layer_norm", THEIR_CLASSES)
def test_every_weight_of_theirs_has_a_place_in_ours(layer_norm) -> None:
    reference = random_reference(layer_norm, torch.float32)
    model = from_hugging_face(reference, architecture_of(reference.config))
    places = [their for name in model.state_dict() for their in hugging_face_names(name, layer_norm)]
    assert len(places) == len(set(places))
    assert {id(reference.get_parameter(name)) for name in places} == {id(weight) for weight in reference.parameters()}


@pytest.mark.parametrize("layer_norm", THEIR_CLASSES)
def test_there_and_back_changes_no_bit(layer_norm) -> None:
    reference = random_reference(layer_norm, torch.float32)
    back = to_hugging_face(from_hugging_face(reference, architecture_of(reference.config)))
    assert type(back) is type(reference)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert all(getattr(back.config, name) == value for name, value in SIZES.items())
    model = random_model(layer_norm, torch.float32)
    again = from_hugging_face(to_hugging_face(model), model.architecture)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert architecture_of(hugging_face_config(model.architecture)) == model.architecture


@pytest.mark.parametrize("layer_norm", THEIR_CLASSES)
@pytest.mark.parametrize("name", ["head.bias", "layers.2.output_norm.bias", "layers.0.attention.qkv.weight"])
def test_a_weight_that_went_wrong_shows_in_the_parity_check(layer_norm, name) -> None:
    model = random_model(layer_norm, torch.float32)
    reference = to_hugging_face(model)
    check_parity(model, reference)
    with torch.no_grad():
        dict(model.named_parameters())[name][5] += 0.05
    with pytest.raises(RuntimeError, match="logits differ"):
        check_parity(model, reference)


@pytest.mark.parametrize("layer_norm", THEIR_CLASSES)
def test_parameters_counted_from_the_sizes_are_those_of_their_model(layer_norm) -> None:
    model = THEIR_CLASSES[layer_norm][1](THEIR_CLASSES[layer_norm][0](**SIZES))
    assert architecture_of(model.config).num_parameters == model.num_parameters()
