"""What the model is by itself; that it is Hugging Face's, weight by weight, is shown in test_hugging_face.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.architecture import Architecture, ModelConfig, resolve
from pretrain.model import NO_LABEL, MaskedLanguageModel

LENGTH = 12


def architecture(layer_norm: str) -> Architecture:
    config = ModelConfig(preset="bert-tiny", layer_norm=layer_norm, hidden_size=32, num_attention_heads=4)
    return resolve(config, vocab_size=101, max_seq_length=LENGTH, pad_token_id=0)


@pytest.fixture(params=["pre_ln", "post_ln"])
def model(request) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = MaskedLanguageModel(architecture(request.param)).double().eval()
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a mix-up shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
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


def test_the_sparse_head_has_the_dense_heads_loss_and_gradients(model, batch) -> None:
    loss = model(**batch)
    loss.backward()
    sparse = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    everywhere = torch.arange(batch["input_ids"].numel())
    labels = torch.full_like(everywhere, NO_LABEL)
    used = batch["masked_lm_ids"] != NO_LABEL
    labels[batch["masked_lm_positions"][used]] = batch["masked_lm_ids"][used]
    logits = model.predict(model.encode(batch["input_ids"], batch["sequence_length"]), everywhere)
    dense = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sparse[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_rows_that_pad_the_vocabulary_are_never_predicted_and_never_learn(model, batch) -> None:
    logits = model.predict(model.encode(batch["input_ids"], batch["sequence_length"]), torch.arange(LENGTH))
    assert logits.shape[1] == 128
    assert logits.softmax(1)[:, 101:].max() == 0
    model(**batch).backward()
    assert not model.embeddings.word.weight.grad[101:].any()
    assert not model.head.bias.grad[101:].any()
    assert model.head.bias.grad[:101].any(), "the decoder's bias is really used"


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
