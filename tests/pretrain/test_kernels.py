"""Kernels change how the model computes, not what: loss, gradients, parameters and their names stay.

NVIDIA's apex and DeepSpeed's CUDA op are stood in for by doubles in plain PyTorch, which check what the real ones take
for granted. They show that the adapters are wired as the interfaces say, not that the kernels work.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.ops.transformer import transformer
from torch import nn
from torch._dynamo.utils import counters

import pretrain.kernels
from common.errors import UserError
from data_prep.shards import Rows
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import MicroBatchShape
from pretrain.kernels import apply_kernels, check_kernels
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch, pack

LENGTH, VOCABULARY, PREDICTIONS = 12, 101, 3
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {
    "packed": MicroBatchShape(sequences=4, max_seq_length=LENGTH, slots=40, predictions=12),
    "padded": MicroBatchShape(sequences=4, max_seq_length=LENGTH, slots=4 * LENGTH, predictions=12),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_model(layer_norm: str = "pre_ln", layers: int = 2, dropout: float = 0.0) -> MaskedLanguageModel:
    """Random weights, biases and norms, so that a mix-up shows."""
    config = ModelConfig(
        preset="bert-tiny",
        layer_norm=layer_norm,
        num_hidden_layers=layers,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    model = MaskedLanguageModel(resolve(config, VOCABULARY, LENGTH, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def micro_batch(shape: MicroBatchShape, seed: int = 0, sequences: int = 3) -> MicroBatch:
    """Sequences of several lengths, and room for another."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, LENGTH, sequences)
    inside = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(inside, generator.integers(1, VOCABULARY, inside.shape), 0).astype(np.uint16)
    masked = np.sort(generator.permuted(np.tile(np.arange(1, 5), (sequences, 1)), axis=1)[:, :PREDICTIONS])
    labels = generator.integers(1, VOCABULARY, masked.shape).astype(np.uint16)
    rows = Rows(ids, lengths.astype(np.uint8), masked.astype(np.uint8), labels)
    return next(pack(rows, shape))


def loss_and_gradients(model: MaskedLanguageModel, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(*batch.model_inputs(CPU))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_training(
    model: MaskedLanguageModel, plain: MaskedLanguageModel, batch: MicroBatch, rtol: float
) -> None:
    """Loss and every gradient, each to ``rtol`` of its largest value; and what a checkpoint holds, in its order."""
    loss, gradients = loss_and_gradients(model, batch)
    expected_loss, expected = loss_and_gradients(plain, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=rtol)
    assert list(gradients) == list(expected)
    for name, gradient in expected.items():
        tolerance = rtol * max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    state, expected_state = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


@pytest.fixture
def without_code_generation(monkeypatch) -> Iterator[None]:
    """Traced, differentiated and guarded as ever, but run by PyTorch's own kernels: quick to start."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", SHAPES)
def test_compiled_loss_and_gradients_equal_the_plain_ones(layout) -> None:
    torch._dynamo.reset()
    model, plain = build_model(layers=1), build_model(layers=1)
    assert apply_kernels(model, "compile", CPU, None, 4, 0) == "compile"
    assert_same_training(model, plain, micro_batch(SHAPES[layout]), rtol=1e-5)


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_training_and_evaluation_compile_once_each_over_all_micro_batches(
    layout, autocast, without_code_generation
) -> None:
    model = build_model(dropout=0.1)
    apply_kernels(model, "compile", CPU, None, 4, 0)
    traced = counters["stats"]["unique_graphs"]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(time.time()))  # DeepSpeed's engine has one like that
    for seed in range(4):
        batches = [micro_batch(SHAPES[layout], seed=10 * seed + number, sequences=2 + number) for number in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.train()
            for batch in batches:
                model(*batch.model_inputs(CPU)).backward()
            model.eval()
            with torch.no_grad():
                for batch in batches:
                    model(*batch.model_inputs(CPU))
    assert len(calls) == 24
    assert counters["stats"]["unique_graphs"] - traced == 2
    assert not counters["graph_break"]


def test_a_compilers_absence_is_one_line(monkeypatch) -> None:
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found\): take kernels eager$"):
        apply_kernels(build_model(), "compile", CPU, None, 4, 0)


@pytest.mark.parametrize(("device", "expected"), [(CPU, "eager"), (GPU, "compile")])
def test_auto_compiles_on_cuda_alone(device, expected, monkeypatch) -> None:
    monkeypatch.setattr(pretrain.kernels, "_check_compiler", lambda _: None)
    model = build_model()
    assert apply_kernels(model, "auto", device, None, 4, 0) == expected
    assert ("forward" in vars(model)) == (expected == "compile")


@pytest.mark.parametrize("kernels", ["apex", "deepspeed"])
def test_kernels_of_a_gpu_are_refused_without_one(kernels) -> None:
    with pytest.raises(UserError, match=f"kernels {kernels} need an NVIDIA GPU"):
        check_kernels(kernels, CPU, None)


def as_apex_casts(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All that apex gets, rounded to autocast's type."""
    enabled = torch.is_autocast_enabled("cpu")
    return [tensor.to(torch.get_autocast_dtype("cpu")) if enabled else tensor for tensor in tensors]


class DoubleOfFusedLayerNorm(nn.Module):
    """apex/normalization/fused_layer_norm.py: weights of its own, everything of one type."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False) -> None:
        super().__init__()
        assert elementwise_affine
        self.normalized_shape, self.eps = torch.Size(normalized_shape), eps
        self.weight = nn.Parameter(torch.full(self.normalized_shape, torch.nan))
        self.bias = nn.Parameter(torch.full(self.normalized_shape, torch.nan))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden, weight, bias = as_apex_casts(hidden, self.weight, self.bias)
        assert hidden.dtype == weight.dtype == bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class DoubleOfFusedDenseFunc(torch.autograd.Function):
    """csrc/fused_dense.cpp: two dimensions, and memory read from end to end."""

    @staticmethod
    def forward(context, hidden, weight, bias):
        assert hidden.ndim == 2
        assert hidden.is_contiguous()
        assert hidden.dtype == weight.dtype == bias.dtype
        context.save_for_backward(hidden, weight)
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(context, gradient):
        assert gradient.is_contiguous()
        hidden, weight = context.saved_tensors
        return gradient @ weight, gradient.T @ hidden, gradient.sum(0)


class DoubleOfFusedDense(nn.Module):
    """apex/fused_dense/fused_dense.py."""

    def __init__(self, in_features, out_features, bias=True) -> None:
        super().__init__()
        assert bias
        self.weight = nn.Parameter(torch.full((out_features, in_features), torch.nan))
        self.bias = nn.Parameter(torch.full((out_features,), torch.nan))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        arguments = as_apex_casts(hidden, self.weight, self.bias)
        with torch.autocast("cpu", enabled=False):
            return DoubleOfFusedDenseFunc.apply(*arguments)


@pytest.fixture
def install_apex(monkeypatch) -> Callable[..., None]:
    """Makes modules of these names and contents importable as apex."""

    def install(**contents: dict[str, type]) -> None:
        monkeypatch.delitem(sys.modules, "pretrain.kernels_apex", raising=False)
        monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
        for name, content in contents.items():
            module = ModuleType(f"apex.{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    yield install
    sys.modules.pop("pretrain.kernels_apex", None)


@pytest.fixture
def apex(install_apex) -> None:
    install_apex(
        normalization={"FusedLayerNorm": DoubleOfFusedLayerNorm}, fused_dense={"FusedDense": DoubleOfFusedDense}
    )


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_apex_has_the_plain_models_loss_gradients_and_parameters(layer_norm, layout, apex) -> None:
    model, plain = build_model(layer_norm).double(), build_model(layer_norm).double()
    parameters = list(model.parameters())
    assert apply_kernels(model, "apex", GPU, torch.bfloat16, 4, 0) == "apex"
    assert not [module for module in model.modules() if type(module) in (nn.LayerNorm, nn.Linear)]
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert_same_training(model, plain, micro_batch(SHAPES[layout]), rtol=1e-10)


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_apex_rounds_no_more_than_autocast_does(layer_norm, apex) -> None:
    model, plain = build_model(layer_norm), build_model(layer_norm)
    apply_kernels(model, "apex", GPU, torch.bfloat16, 4, 0)
    ids, lengths, positions, *_ = micro_batch(SHAPES["packed"]).model_inputs(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, expected = (either.encode(ids, lengths, LENGTH) for either in (model, plain))
        logits, expected_logits = model.predict(hidden, positions), plain.predict(expected, positions)
    assert hidden.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits)


class NotBuilt(nn.Module):
    """What a Python-only build of apex does."""

    def __init__(self, *_) -> None:
        raise ModuleNotFoundError("No module named 'fused_layer_norm_cuda'")


@pytest.mark.parametrize(
    "contents", [{}, {"normalization": {"FusedLayerNorm": NotBuilt}, "fused_dense": {"FusedDense": NotBuilt}}]
)
def test_another_apex_or_one_without_cuda_is_one_line(contents, install_apex) -> None:
    install_apex(**contents)
    with pytest.raises(UserError, match=r"NVIDIA's apex, built with its CUDA extensions .*No module named .*PyPI"):
        apply_kernels(build_model(), "apex", GPU, torch.bfloat16, 4, 0)


SETTINGS = "batch hidden heads intermediate attention_dropout hidden_dropout eps seed pre_ln".split()


class DoubleOfTransformerOp:
    """csrc/transformer/ds_transformer_cuda.cpp by its arguments' places; :meth:`_layer` is BertTransformerLayer.

    DeepSpeed's Python above it is the real one.
    """

    def __init__(self) -> None:
        self.created: dict[int, SimpleNamespace] = {}

    def load(self) -> "DoubleOfTransformerOp":
        return self

    def _create(self, dtype, layer_id, *settings_and_flags):
        settings, flags = settings_and_flags[:9], settings_and_flags[9:]
        assert flags == (False,) * 5
        self.created[layer_id] = SimpleNamespace(dtype=dtype, **dict(zip(SETTINGS, settings, strict=True)))

    def _forward(self, layer_id, hidden, mask, *weights_and_flags):
        weights, (self.training, pre_ln, *checkpoints) = weights_and_flags[:12], weights_and_flags[12:]
        created = self.created[layer_id]
        assert (pre_ln, checkpoints) == (created.pre_ln, [False] * 3)
        assert len(hidden) <= created.batch
        assert hidden.shape[1] % 16 == 0
        for tensor in (hidden, mask, *weights):
            assert tensor.is_contiguous()
            assert tensor.dtype in (created.dtype, torch.float64)
        assert mask.shape == (len(hidden), 1, 1, hidden.shape[1])
        saved = [hidden.new_empty(0)] * 16
        return self._layer(created, hidden, mask, *weights), *saved

    def _backward(self, layer_id, gradient, *saved):
        hidden, mask, *weights = saved[-14:]
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (hidden, *weights)]
            output = self._layer(self.created[layer_id], inputs[0], mask, *inputs[1:])
        return torch.autograd.grad(output, inputs, gradient)

    @staticmethod
    def _layer(
        created, hidden, mask, attn_qkvw, attn_qkvb, attn_ow, attn_ob, attn_nw, attn_nb,
        inter_w, inter_b, output_w, output_b, norm_w, norm_b,
    ):  # fmt: skip
        def norm(values, weight, bias):
            return F.layer_norm(values, values.shape[-1:], weight, bias, created.eps)

        attended = norm(hidden, norm_w, norm_b) if created.pre_ln else hidden
        qkv = (attended @ attn_qkvw.T + attn_qkvb).unflatten(-1, (3, created.heads, -1))
        query, key, value = (qkv[:, :, index].transpose(1, 2) for index in range(3))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + mask
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        residual = hidden + context @ attn_ow.T + attn_ob
        between = norm(residual, attn_nw, attn_nb)
        inner = F.gelu(between @ inter_w.T + inter_b, approximate="tanh")
        output = (residual if created.pre_ln else between) + inner @ output_w.T + output_b
        return output if created.pre_ln else norm(output, norm_w, norm_b)

    create_transformer_layer_fp32 = functools.partialmethod(_create, torch.float32)
    create_transformer_layer_fp16 = functools.partialmethod(_create, torch.float16)
    forward_fp32 = forward_fp16 = _forward
    backward_fp32 = backward_fp16 = _backward


@pytest.fixture
def op(monkeypatch) -> DoubleOfTransformerOp:
    op = DoubleOfTransformerOp()
    monkeypatch.setattr(transformer, "TransformerBuilder", lambda: op)
    monkeypatch.setattr(transformer, "transformer_cuda_module", None)
    return op


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_deepspeeds_kernel_has_the_plain_layers_loss_and_gradients(layer_norm, layout, op, monkeypatch) -> None:
    monkeypatch.setattr(F, "gelu", functools.partial(F.gelu, approximate="tanh"))  # the one difference that is meant
    model, plain = build_model(layer_norm).double(), build_model(layer_norm).double()
    assert apply_kernels(model, "deepspeed", GPU, None, 4, 0) == "deepspeed"
    assert_same_training(model, plain, micro_batch(SHAPES[layout]), rtol=1e-10)


def test_deepspeeds_kernel_is_told_the_models_settings_and_mode(op) -> None:
    model = build_model(dropout=0.1).double()
    apply_kernels(model, "deepspeed", GPU, None, sequences=4, dropout_seed=2**32 - 1)
    settings = dict(zip(SETTINGS, (4, 32, 4, 128, 0.1, 0.1, 1e-12, 2**31 - 1, True), strict=True))
    assert [vars(created) for created in op.created.values()] == 2 * [{"dtype": torch.float32, **settings}]
    inputs = micro_batch(SHAPES["packed"]).model_inputs(CPU)
    model(*inputs)
    assert op.training
    model.eval()(*inputs)
    assert not op.training


def test_deepspeeds_kernel_gets_fp16_copies_of_fp32_weights(op) -> None:
    model, plain = build_model(), build_model()
    apply_kernels(model, "deepspeed", GPU, torch.float16, 4, 0)
    assert {created.dtype for created in op.created.values()} == {torch.float16}
    with torch.autocast("cpu", torch.float16):
        assert_same_training(model, plain, micro_batch(SHAPES["packed"]), rtol=2e-2)


def test_deepspeeds_kernel_refuses_bf16() -> None:
    with pytest.raises(UserError, match="fp16 and fp32 only, and ds_config has bf16"):
        check_kernels("deepspeed", GPU, torch.bfloat16)


def test_a_kernel_of_deepspeed_that_cant_be_built_is_one_line(monkeypatch) -> None:
    def fail():
        raise RuntimeError("Error building extension 'transformer'\nnvcc: not found")

    monkeypatch.setattr(transformer, "TransformerBuilder", lambda: SimpleNamespace(load=fail))
    with pytest.raises(UserError, match=r"can't be built here \(Error building extension 'transformer'\): take"):
        apply_kernels(build_model(), "deepspeed", GPU, None, 4, 0)
