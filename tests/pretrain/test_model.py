"""The model is Hugging Face's, weight by weight: logits, loss and every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.export import to_hugging_face
from pretrain.model import NO_LABEL, Architecture, MaskedLanguageModel, ModelConfig, resolve

LENGTH = 12


def architecture(layer_norm: str) -> Architecture:
    config = ModelConfig(preset="bert-tiny", layer_norm=layer_norm, hidden_size=32, num_attention_heads=4)
    return resolve(config, vocab_size=101, max_seq_length=LENGTH, pad_token_id=0)


@pytest.fixture(params=["pre_ln", "post_ln"])
def model(request) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = MaskedLanguageModel(architecture(request.param)).double().eval()
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a mix-up shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            if name == "head.bias":
                parameter[101:] = -1e4
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    sequence_length = torch.tensor([LENGTH, 7, 3])
    input_ids = torch.randint(1, 101, (3, LENGTH))
    input_ids[torch.arange(LENGTH) >= sequence_length[:, None]] = 0
    positions = torch.tensor([1, 5, LENGTH + 2, 2 * LENGTH + 1, 0, 0])
    labels = torch.tensor([9, 100, 55, 7, NO_LABEL, NO_LABEL])
    return {
        "input_ids": input_ids,
        "sequence_length": sequence_length,
        "masked_lm_positions": positions,
        "masked_lm_ids": labels,
    }


def hugging_face_loss(reference, batch) -> torch.Tensor:
    """The dense head's loss, summed over the same predictions."""
    attention_mask = torch.arange(LENGTH) < batch["sequence_length"][:, None]
    labels = torch.full((3 * LENGTH,), NO_LABEL)
    used = batch["masked_lm_ids"] != NO_LABEL
    labels[batch["masked_lm_positions"][used]] = batch["masked_lm_ids"][used]
    logits = reference(input_ids=batch["input_ids"], attention_mask=attention_mask.long()).logits
    return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=NO_LABEL, reduction="sum")


def test_logits_equal_hugging_faces_at_every_real_position(model, batch) -> None:
    reference = to_hugging_face(model)
    real = torch.arange(LENGTH) < batch["sequence_length"][:, None]
    with torch.no_grad():
        hidden = model.encode(batch["input_ids"], batch["sequence_length"])
        ours = model.predict(hidden, real.flatten().nonzero().squeeze(1))[:, :101]
        theirs = reference(input_ids=batch["input_ids"], attention_mask=real.long()).logits[real]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_sparse_head_has_the_dense_heads_loss_and_gradients(model, batch) -> None:
    reference = to_hugging_face(model)
    loss, expected = model(**batch), hugging_face_loss(reference, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)  # ours sums logits in float32
    loss.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    pairs = [
        (model.embeddings.word.weight.grad[:101], theirs["bert.embeddings.word_embeddings.weight"].grad),
        (model.embeddings.position.weight.grad, theirs["bert.embeddings.position_embeddings.weight"].grad),
        (model.head.dense.weight.grad, theirs["cls.predictions.transform.dense.weight"].grad),
        (model.head.bias.grad[:101], theirs["cls.predictions.bias"].grad),
    ]
    for index, layer in enumerate(model.layers):
        prefix = f"bert.encoder.layer.{index}"
        qkv = [theirs[f"{prefix}.attention.self.{name}.weight"].grad for name in ("query", "key", "value")]
        pairs += [
            (layer.attention.qkv.weight.grad, torch.cat(qkv)),
            (layer.attention.output.weight.grad, theirs[f"{prefix}.attention.output.dense.weight"].grad),
            (layer.intermediate.weight.grad, theirs[f"{prefix}.intermediate.dense.weight"].grad),
            (layer.output.bias.grad, theirs[f"{prefix}.output.dense.bias"].grad),
        ]
    for ours, reference_gradient in pairs:
        torch.testing.assert_close(ours, reference_gradient, rtol=1e-5, atol=1e-6)
    assert not model.embeddings.word.weight.grad[101:].any(), "rows that pad the vocabulary must not learn"


def test_padding_does_not_change_the_loss(model, batch) -> None:
    polluted = {**batch, "input_ids": batch["input_ids"].clone()}
    padding = torch.arange(LENGTH) >= batch["sequence_length"][:, None]
    polluted["input_ids"][padding] = 77
    assert model(**polluted).item() == pytest.approx(model(**batch).item(), abs=1e-9)


def test_weights_start_normal_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    config = ModelConfig(preset="bert-mini")
    model = MaskedLanguageModel(resolve(config, vocab_size=1000, max_seq_length=64, pad_token_id=0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.numel() > 10_000:
            rows = parameter[1:1000] if name == "embeddings.word.weight" else parameter
            assert rows.std().item() == pytest.approx(0.02, rel=0.02), name
            assert abs(rows.mean().item()) < 0.02 * 5 / math.sqrt(rows.numel()), name
        elif name.endswith("bias"):
            assert not parameter[:1000].any(), name
    assert not model.embeddings.word.weight[0].any(), "[PAD]"


def test_contradictory_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        resolve(ModelConfig(preset="bert-tiny", num_attention_heads=3), 100, 64, 0)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        resolve(ModelConfig(preset="bert-tiny", max_position_embeddings=32), 100, 64, 0)
