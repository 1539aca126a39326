import math
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from common.errors import UserError
from finetune import optimizers
from finetune.optimizers import Optimizer, check_memory, parse_optim

CPU = torch.device("cpu")
GIB = 2**30
BERT_TINY = 4_386_178
PUBLISHED = Optimizer("mfac", num_grads=1024)


def step_of(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    for number in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def new_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (7, 30)]


def groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (Optimizer(), {}),
        (
            Optimizer(adam_beta1=0.8, adam_beta2=0.98, adam_epsilon=1e-6),
            {"betas": (0.8, 0.98), "eps": 1e-6},
        ),
    ],
)
def test_adamw_is_torchs_with_its_arguments(optimizer: Optimizer, arguments: dict) -> None:
    ours, torchs = new_parameters(), new_parameters()
    found = step_of(optimizer.build(groups(ours), 0.1), ours)
    expected = step_of(torch.optim.AdamW(groups(torchs), lr=0.1, fused=True, **arguments), torchs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_mfac_is_built_with_its_arguments() -> None:
    parameters = new_parameters()
    built = Optimizer("mfac", num_grads=5, gradient_dtype="bf16").build(groups(parameters), 0.25)
    step_of(built, parameters)
    assert built.state["window"]["gradients"].shape == (1, 5, 37)
    assert built.state["window"]["gradients"].dtype == torch.bfloat16
    assert [(group["lr"], group["weight_decay"]) for group in built.param_groups] == [(0.25, 0.1), (0.25, 0.0)]


def test_mfacs_damping_is_the_argument() -> None:
    """With one gradient g the step is learning rate x g / (damp + g^2)."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    built = Optimizer("mfac", num_grads=1, damp=3.0).build([{"params": [parameter]}], 0.5)
    parameter.grad = torch.ones(1)
    built.step()
    assert parameter.item() == pytest.approx(-0.5 / 4)


@pytest.mark.parametrize(
    "optimizer", [Optimizer(), *(Optimizer("mfac", num_grads=6, gradient_dtype=it) for it in ("fp32", "bf16", "fp16"))]
)
def test_state_bytes_are_those_of_the_built_state(optimizer: Optimizer) -> None:
    parameters = new_parameters()
    built = optimizer.build(groups(parameters), 0.1)
    step_of(built, parameters)
    tensors = [value for state in built.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    counters = 4 * len(parameters) if optimizer.name == "adamw" else 0
    assert optimizer.state_bytes(37) == sum(tensor.nbytes for tensor in tensors) - counters


def test_titles_tell_apart_what_differs() -> None:
    titles = {
        Optimizer(): "AdamW",
        Optimizer(adam_beta2=0.98): "AdamW, beta2 0.98",
        Optimizer("mfac"): "M-FAC 1024 gradients",
        Optimizer("mfac", num_grads=64, damp=1e-4, gradient_dtype="bf16"): "M-FAC 64 gradients in bf16, damp 0.0001",
    }
    assert {optimizer: optimizer.title for optimizer in titles} == titles


@pytest.mark.parametrize(
    "text", ['{"lr": 1e-4, "num_grads": 64, "damp": 1e-5}', "lr=1e-4,num_grads=64,damp=1e-5", "num_grads=64, damp=1e-5"]
)
def test_both_forms_of_optim_args_are_read(text: str) -> None:
    optimizer, learning_rate = parse_optim("MFAC", text)
    assert optimizer == Optimizer("mfac", num_grads=64, damp=1e-5)
    assert learning_rate == (1e-4 if "lr" in text else None)


@pytest.mark.parametrize("name", ["adamw_torch", "ADAMW_TORCH_FUSED", "adamw_hf", "AdamW"])
def test_run_glues_names_of_adamw_are_known(name: str) -> None:
    assert parse_optim(name, None) == (Optimizer(), None)
    assert parse_optim(name, '{"adam_beta2": 0.98}') == (Optimizer(adam_beta2=0.98), None)


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("sgd", None, "--optim: there is no optimizer 'sgd'; there are: adamw, .*mfac"),
        ("mfac", '{"num_grads": ', "--optim_args is no JSON"),
        ("mfac", "num_grads", "name=value"),
        ("mfac", '{"ngrads": 4}', "mfac has no argument 'ngrads'; it has: lr, num_grads, damp, gradient_dtype"),
        ("adamw", "num_grads=4", "adamw has no argument 'num_grads'; it has: lr, adam_beta1"),
        ("mfac", "num_grads=1.5", "num_grads is '1.5': it must be a whole number"),
        ("mfac", '{"num_grads": true}', "num_grads is True"),
        ("mfac", '{"damp": [1]}', "damp is .*: it must be a number"),
        ("mfac", "num_grads=0", "num_grads is 0: it must be 1 or more"),
        ("mfac", "damp=0", "damp is 0.0: it must be above 0"),
        ("mfac", "damp=nan", "damp is nan"),
        ("mfac", "gradient_dtype=int8", "gradient_dtype is int8: it must be one of fp32, bf16, fp16"),
        ("mfac", "lr=-1", "lr is -1.0"),
        ("adamw", "adam_beta1=1", "adam_beta1 is 1.0"),
    ],
)
def test_a_wrong_optimizer_or_argument_is_named(optim: str, optim_args: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_optim(optim, optim_args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sgd"}, "there are: adamw, mfac"),
        ({"num_grads": 4}, "adamw has no argument num_grads"),
        ({"name": "mfac", "adam_beta1": 0.9}, "mfac has no argument adam_beta1; it has: num_grads"),
        ({"name": "mfac", "damp": math.inf}, "damp is inf"),
    ],
)
def test_a_configuration_with_wrong_arguments_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(**arguments)


@pytest.fixture
def free_gib(monkeypatch: pytest.MonkeyPatch):
    def set_free(gib: float) -> None:
        memory = types.SimpleNamespace(available=int(gib * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(optimizers, "_left_in_cgroups", lambda *_: iter(()))

    return set_free


def test_memory_that_suffices_passes(free_gib) -> None:
    free_gib(19)
    check_memory(PUBLISHED, BERT_TINY, CPU, num_at_a_time=1)
    free_gib(0)
    check_memory(Optimizer(), BERT_TINY, CPU, num_at_a_time=1)


@pytest.mark.parametrize("num_at_a_time", [1, 3])
def test_what_would_fit_does_and_not_one_gradient_more(free_gib, num_at_a_time: int) -> None:
    free_gib(5 * num_at_a_time)
    with pytest.raises(UserError) as caught:
        check_memory(PUBLISHED, BERT_TINY, CPU, num_at_a_time)
    message = str(caught.value)
    assert "needs 17.8 GiB" in message
    assert "there are 5.0 GiB" in message
    words = message.split()
    for dtype in ("fp32", "bf16"):
        number = int(words[words.index(dtype) - 2])
        check_memory(replace(PUBLISHED, num_grads=number, gradient_dtype=dtype), BERT_TINY, CPU, num_at_a_time)
        with pytest.raises(UserError):
            check_memory(replace(PUBLISHED, num_grads=number + 1, gradient_dtype=dtype), BERT_TINY, CPU, num_at_a_time)


def test_a_model_too_large_for_any_window_is_told_so(free_gib) -> None:
    free_gib(2)
    with pytest.raises(UserError, match="not even one gradient fits, take adamw"):
        check_memory(PUBLISHED, 10**9, CPU, num_at_a_time=1)


def test_a_gpu_counts_with_its_whole_memory(free_gib, monkeypatch: pytest.MonkeyPatch) -> None:
    free_gib(1000)
    properties = types.SimpleNamespace(total_memory=12 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(UserError, match=r"12\.0 GiB on the CUDA"):
        check_memory(PUBLISHED, BERT_TINY, torch.device("cuda:0"), num_at_a_time=1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_limit_counts_what_it_leaves(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    top, limit, usage = (
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else (root, "memory.max", "memory.current")
    )
    membership.write_text({1: "5:cpu:/\n4:memory:/job/step\n0::/\n", 2: "0::/job/step\n"}[version])
    for folder, limited in ((top / "job", str(8 * GIB)), (top / "job" / "step", str(2**63) if version == 1 else "max")):
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{limited}\n")
        (folder / usage).write_text(f"{5 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 7\nactive_file {GIB}\ninactive_file {GIB}\n")
    assert min(optimizers._left_in_cgroups(membership, root)) == 5 * GIB
    membership.unlink()
    assert list(optimizers._left_in_cgroups(membership, root)) == []
