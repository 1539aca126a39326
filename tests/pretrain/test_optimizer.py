"""Which rule updates which parameter, and that each rule is its paper's."""

import io
import math
from collections.abc import Iterator

import pytest
import torch

from common.errors import UserError
from pretrain.architecture import ModelConfig, resolve
from pretrain.lamb import Lamb
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer, check_optimizer

NAMES = ("adamw", "lamb", "adafactor", "muon")
HIDDEN, VOCABULARY, LENGTH = 32, 101, 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_model(layer_norm: str = "pre_ln") -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(preset="bert-tiny", layer_norm=layer_norm, hidden_size=HIDDEN, num_attention_heads=4)
    return MaskedLanguageModel(resolve(config, vocab_size=VOCABULARY, max_seq_length=LENGTH, pad_token_id=0))


@pytest.fixture
def random_model() -> MaskedLanguageModel:
    """Weights and gradients of one size, with nothing at zero or at a value of its own."""
    model = build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    set_gradients(model, seed=1)
    return model


def step(optimizer: torch.optim.Optimizer, multiplier: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = multiplier * group["peak_learning_rate"]
    optimizer.step()


def set_gradients(model: MaskedLanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)


def weights(model: MaskedLanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moves_of_first_step(model: MaskedLanguageModel, config: OptimizerConfig) -> dict[str, torch.Tensor]:
    """What a first step with the gradients that ``model`` has takes from each parameter."""
    before, optimizer = weights(model), build_optimizer(model, config)
    step(optimizer)
    return {name: before[name] - after for name, after in weights(model).items()}


# --- who is in which group -------------------------------------------------------------------------------------------

MATRICES = ("attention.qkv.weight", "attention.output.weight", "intermediate.weight", "output.weight")
VECTORS = (
    "attention.qkv.bias attention.output.bias intermediate.bias output.bias "
    "attention_norm.weight attention_norm.bias output_norm.weight output_norm.bias"
).split()


def expected_kinds(layer_norm: str) -> dict[str, str]:
    """Every parameter's kind, written down by hand."""
    first_norm = "final_norm" if layer_norm == "pre_ln" else "embeddings.norm"
    kinds = {
        "embeddings.word.weight": "embedding",
        "embeddings.position.weight": "embedding",
        "embeddings.token_type.weight": "embedding",
        f"{first_norm}.weight": "vector",
        f"{first_norm}.bias": "vector",
        "head.dense.weight": "matrix",
        "head.dense.bias": "vector",
        "head.norm.weight": "vector",
        "head.norm.bias": "vector",
        "head.bias": "vector",
    }
    for layer in range(2):
        kinds |= {f"layers.{layer}.{name}": "matrix" for name in MATRICES}
        kinds |= {f"layers.{layer}.{name}": "vector" for name in VECTORS}
    return kinds


def settings_by_name(model, optimizer, key: str) -> dict[str, object]:
    """A group setting of every parameter, each of which is in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group[key]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names)
    return dict(found)


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_on_matrices_and_embeddings_only(name, layer_norm) -> None:
    model = build_model(layer_norm)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.07))
    expected = {key: 0.0 if kind == "vector" else 0.07 for key, kind in expected_kinds(layer_norm).items()}
    assert settings_by_name(model, optimizer, "weight_decay") == expected


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_muon_has_the_matrices_and_adamw_the_rest(layer_norm) -> None:
    model = build_model(layer_norm)
    config = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.03)
    optimizer = build_optimizer(model, config)
    kinds = expected_kinds(layer_norm)
    assert settings_by_name(model, optimizer, "use_muon") == {key: kind == "matrix" for key, kind in kinds.items()}
    peaks = {key: 0.03 if kind == "matrix" else 1e-3 for key, kind in kinds.items()}
    assert settings_by_name(model, optimizer, "peak_learning_rate") == peaks
    split = {name for name, parameter in model.named_parameters() if hasattr(parameter, "muon_num_heads")}
    assert split == {"layers.0.attention.qkv.weight", "layers.1.attention.qkv.weight"}


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_decay_rates_are_the_configurations(name) -> None:
    config = OptimizerConfig(name=name, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-4, muon_momentum=0.6)
    for group in build_optimizer(build_model(), config).param_groups:
        if group.get("use_muon"):
            assert group["momentum"] == 0.6
        else:
            assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-4)


# --- the rules -------------------------------------------------------------------------------------------------------


def lamb_of_the_paper(weight, gradients, rates, beta1, beta2, eps, decay, adapted) -> torch.Tensor:
    """Algorithm 2 on one tensor, in float64."""
    x, m, v = weight.double(), torch.zeros(1).double(), torch.zeros(1).double()
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        update = r + decay * x
        x_norm, update_norm = math.sqrt((x * x).sum()), math.sqrt((update * update).sum())
        ratio = x_norm / update_norm if adapted and x_norm and update_norm else 1.0
        x = x - rate * ratio * update
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lamb_is_algorithm_2(decay, adapted, dtype, tolerance) -> None:
    torch.manual_seed(0)
    starts = [torch.randn(7, 5), 30 * torch.randn(4), torch.zeros(3, 3), torch.randn(6, 2)]
    gradients = [[torch.randn_like(x) * 10.0 ** (i - 2) for x in starts] for i in range(5)]
    for of_step in gradients:
        of_step[3].zero_()  # neither gradient nor, without decay, update
    params = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in starts]
    rates = [0.01, 0.05, 0.03, 0.02, 0.0]
    optimizer = Lamb(params, 0.0, (0.9, 0.95), 1e-6, weight_decay=decay, layer_adaptation=adapted)
    for of_step, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(params, of_step, strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
    for i, parameter in enumerate(params):
        own = [of_step[i] for of_step in gradients]
        expected = lamb_of_the_paper(starts[i], own, rates, 0.9, 0.95, 1e-6, decay, adapted)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_moves_matrices_by_their_norm_and_vectors_by_adams_step(weight_decay, random_model) -> None:
    before = weights(random_model)
    config = OptimizerConfig(name="lamb", learning_rate=0.01, weight_decay=weight_decay)
    moves = moves_of_first_step(random_model, config)
    for name, parameter in random_model.named_parameters():
        if parameter.ndim >= 2:
            assert moves[name].norm().item() == pytest.approx(0.01 * before[name].norm().item(), rel=1e-4), name
        else:
            expected = 0.01 * parameter.grad / (parameter.grad.abs() + 1e-6)
            torch.testing.assert_close(moves[name], expected, rtol=1e-4, atol=1e-6)


def test_adamw_decays_and_steps_apart(random_model) -> None:
    before = weights(random_model)
    moves = moves_of_first_step(random_model, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    for name, parameter in random_model.named_parameters():
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        expected = 0.01 * (decay * before[name] + parameter.grad / (parameter.grad.abs() + 1e-6))
        torch.testing.assert_close(moves[name], expected, rtol=1e-4, atol=1e-6)


def test_adafactors_learning_rate_is_a_share_of_the_parameters_root_mean_square(random_model) -> None:
    for parameter in random_model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)  # its squares factor exactly, so that the update is all ones
    before = weights(random_model)
    config = OptimizerConfig(name="adafactor", learning_rate=0.02, weight_decay=0.0)
    for name, move in moves_of_first_step(random_model, config).items():
        size = before[name].square().mean().sqrt()
        torch.testing.assert_close(move, (0.02 * size).expand_as(move), rtol=1e-3, atol=1e-6)


def test_muon_moves_matrices_along_the_orthogonal_factor_of_their_gradient(random_model) -> None:
    factors = {}
    for name, parameter in random_model.named_parameters():
        if parameter.ndim >= 2 and not name.startswith("embeddings."):
            blocks = parameter.grad.view(3 if "qkv" in name else 1, -1, parameter.shape[1])
            left, _, right = torch.linalg.svd(blocks, full_matrices=False)
            blocks.copy_(left * torch.linspace(1.0, 0.2, HIDDEN) @ right)
            factors[name] = (left, right)
    assert len(factors) == 2 * 4 + 1
    config = OptimizerConfig(name="muon", muon_learning_rate=0.1, weight_decay=0.0)
    moves = moves_of_first_step(random_model, config)
    for name, (left, right) in factors.items():
        rows, columns = left.shape[1], right.shape[2]
        update = moves[name].view(len(left), rows, columns) / (0.1 * math.sqrt(max(1, rows / columns)))
        core = left.mT @ update @ right.mT
        singular_values = core.diagonal(dim1=1, dim2=2)
        assert singular_values.min() > 0.6, name
        assert singular_values.max() < 1.3, name
        torch.testing.assert_close(core, torch.diag_embed(singular_values), rtol=0, atol=1e-3)


def test_muon_moves_everything_else_as_adamw_does(random_model) -> None:
    start = random_model.state_dict()
    gradients = {name: parameter.grad for name, parameter in random_model.named_parameters()}
    moves = {}
    for rule in ("muon", "adamw"):
        model = build_model()
        model.load_state_dict(start)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        moves[rule] = moves_of_first_step(model, OptimizerConfig(name=rule, learning_rate=0.01, weight_decay=0.1))
    for name, kind in expected_kinds("pre_ln").items():
        if kind != "matrix":
            torch.testing.assert_close(moves["muon"][name], moves["adamw"][name], rtol=1e-4, atol=1e-6)


def test_muon_compiles_nothing_on_a_cpu() -> None:
    model = build_model()
    set_gradients(model, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    torch._dynamo.reset()  # whatever was compiled before
    torch._dynamo.utils.counters.clear()
    step(optimizer)
    assert not torch._dynamo.utils.counters["frames"]
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(1))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1  # other code still is


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
@pytest.mark.parametrize(
    ("name", "learning_rate"), [("adamw", 2e-3), ("lamb", 2e-2), ("adafactor", 3e-2), ("muon", 2e-3)]
)
def test_the_loss_falls(name, learning_rate, layer_norm) -> None:
    model = build_model(layer_norm)
    input_ids = torch.randint(1, VOCABULARY, (8, LENGTH))
    labels, positions = torch.randint(1, VOCABULARY, (20,)), torch.randperm(8 * LENGTH)[:20]
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=learning_rate))
    losses = []
    for i in range(40):
        loss = model(input_ids, torch.full((8,), LENGTH), positions, labels) / len(labels)
        loss.backward()
        step(optimizer, multiplier=min(1.0, (i + 1) / 10))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert losses[-1] < losses[0] - 1


# --- between optimizer and engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_bit_by_bit(name) -> None:
    config, model = OptimizerConfig(name=name), build_model()
    optimizer = build_optimizer(model, config)
    for i in range(3):
        set_gradients(model, seed=i)
        step(optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed = build_model()
    resumed_optimizer = build_optimizer(resumed, config)
    saved_model, saved_optimizer = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved_model)
    resumed_optimizer.load_state_dict(saved_optimizer)
    for i in range(3, 6):
        set_gradients(model, seed=i)
        step(optimizer, multiplier=0.5)
        set_gradients(resumed, seed=i)
        step(resumed_optimizer, multiplier=0.5)
    expected = weights(model)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(resumed).items())


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_brings_no_settings(name) -> None:
    model = build_model()
    saved = build_optimizer(model, OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1)).state_dict()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=5e-3, weight_decay=0.2))
    optimizer.load_state_dict(saved)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}
    assert optimizer.param_groups[-1]["peak_learning_rate"] == 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_scaler_changes_nothing_and_an_overflow_skips_the_step(name) -> None:
    config = OptimizerConfig(name=name)
    models = [build_model(), build_model()]
    plain, scaled = (build_optimizer(model, config) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, overflow in enumerate([True, False, True, False]):
        set_gradients(models[1], seed=i)
        scale = scaler.scale(torch.ones(()))
        for parameter in models[1].parameters():
            parameter.grad *= scale
        if overflow:
            models[1].layers[0].intermediate.weight.grad[0, 0] = math.inf
        else:
            set_gradients(models[0], seed=i)
            step(plain)
        for group in scaled.param_groups:
            group["lr"] = group["peak_learning_rate"]
        scaler.step(scaled)
        scaler.update()
    expected = weights(models[0])
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(models[1]).items())


@pytest.mark.parametrize("name", NAMES)
def test_only_adamw_may_have_its_parameters_cut_or_copied(name) -> None:
    config = OptimizerConfig(name=name)
    check_optimizer(config, zero_stage=0, half_precision_weights=False)
    for zero_stage, half in ((1, False), (1, True), (0, True)):
        if name == "adamw":
            check_optimizer(config, zero_stage, half)
        else:
            with pytest.raises(UserError, match=f"optimizer {name} needs whole float32 weights"):
                check_optimizer(config, zero_stage, half)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("muon_learning_rate", -0.02),
        ("adam_epsilon", 0.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("muon_momentum", 1.0),
        ("weight_decay", -0.01),
        ("weight_decay", math.nan),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(field, value) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer\.{field} must be .* not {value}$"):
        OptimizerConfig(**{field: value})
