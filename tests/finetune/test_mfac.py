"""M-FAC against the dense inverse of the damped empirical Fisher matrix, computed by numpy in float64."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import mfac
from finetune.mfac import MFAC

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(3, 4), (5,), (2, 2, 3)]
DAMP = 1e-3
Parameters = list[torch.nn.Parameter]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfac, "_CPU_COLUMNS", 8)


def new_parameters(dtype: torch.dtype = torch.float64) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in SHAPES]


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors]).numpy()


def draw_gradients(parameters: Parameters, step: int, size: float = 0.3) -> np.ndarray:
    """With a part that all steps share, as a loss's have."""
    shared, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, dtype=torch.float64, generator=shared)
        gradient += torch.randn(parameter.shape, dtype=torch.float64, generator=own)
        parameter.grad = (size * gradient).to(parameter.dtype)
    return flat([parameter.grad for parameter in parameters])


def dense_direction(gradients: list[np.ndarray], num_grads: int, damp: float = DAMP) -> np.ndarray:
    window = np.array(gradients[-num_grads:])
    fisher = damp * np.eye(window.shape[1]) + window.T @ window / num_grads
    return np.linalg.solve(fisher, gradients[-1])


def moved_by(parameters: Parameters, step: Callable[[], object]) -> np.ndarray:
    before = flat(parameters)
    step()
    return before - flat(parameters)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("num_grads", [1, 4, 100], ids=["of one", "that slides", "that never fills"])
def test_every_step_is_the_dense_inverse_times_the_gradient(num_grads: int) -> None:
    parameters = new_parameters()
    optimizer = MFAC(parameters, 1.0, num_grads, DAMP, torch.float64)
    gradients = []
    for step in range(11):
        gradients.append(draw_gradients(parameters, step))
        found = moved_by(parameters, optimizer.step)
        assert relative_error(found, dense_direction(gradients, num_grads)) < 1e-8, step


def test_a_window_that_has_slid_for_long_is_as_exact_as_a_new_one() -> None:
    parameters = new_parameters()
    optimizer = MFAC(parameters, 1.0, 5, 1e-6, torch.float64)
    gradients = [draw_gradients(parameters, step) for step in range(200)]
    for step in range(200):
        draw_gradients(parameters, step)
        found = moved_by(parameters, optimizer.step)
    assert relative_error(found, dense_direction(gradients, 5, damp=1e-6)) < 1e-8


def test_groups_have_their_learning_rates_and_decay_and_share_one_fisher_matrix() -> None:
    parameters = new_parameters()
    groups = [
        {"params": parameters[:2], "lr": 0.5, "weight_decay": 0.2},
        {"params": parameters[2:], "weight_decay": 0.0},
    ]
    optimizer = MFAC(groups, 0.1, 3, DAMP, torch.float64)
    gradients = []
    for step in range(5):
        before = flat(parameters)
        gradients.append(draw_gradients(parameters, step))
        optimizer.step()
        direction = dense_direction(gradients, 3)
        in_first_group = np.arange(len(before)) < 17
        expected = before - np.where(in_first_group, 0.5 * (direction + 0.2 * before), 0.1 * direction)
        np.testing.assert_allclose(flat(parameters), expected, rtol=1e-8)


def test_a_schedule_sets_the_steps_size() -> None:
    parameters = new_parameters()
    optimizer = MFAC(parameters, 1.0, 3, DAMP, torch.float64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    gradients = []
    for step in range(5):
        gradients.append(draw_gradients(parameters, step))
        found = moved_by(parameters, optimizer.step)
        assert relative_error(found, dense_direction(gradients, 3) / (1 + step)) < 1e-8
        schedule.step()


def test_a_parameter_without_gradient_stays_and_counts_as_zero() -> None:
    parameters = new_parameters()
    optimizer = MFAC(parameters, 1.0, 3, DAMP, torch.float64, weight_decay=0.1)
    gradients = [draw_gradients(parameters, step=0)]
    optimizer.step()
    draw_gradients(parameters, step=1)
    parameters[1].grad = None
    last = parameters[1].detach().clone()
    gradients.append(np.concatenate([flat([parameters[0].grad]), np.zeros(5), flat([parameters[2].grad])]))
    before = flat(parameters)
    found = moved_by(parameters, optimizer.step) - 0.1 * before
    assert torch.equal(parameters[1].detach(), last)
    with_gradient = np.r_[0:12, 17:29]
    expected = dense_direction(gradients, 3)
    assert relative_error(found[with_gradient], expected[with_gradient]) < 1e-8


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("size", [0.3, 1e-7, 1e6], ids=["usual", "below float16's range", "above float16's range"])
def test_smaller_precision_keeps_its_digits_whatever_the_gradients_size(
    dtype: torch.dtype, precision: float, size: float
) -> None:
    parameters = new_parameters(torch.float32)
    damp = 0.1 * size**2
    optimizer = MFAC(parameters, size, 4, damp, dtype)  # steps are about size / size
    gradients = []
    for step in range(7):
        gradients.append(draw_gradients(parameters, step, size))
        before = flat(parameters)
        optimizer.step()
        found = (before - flat(parameters)) / size
        assert relative_error(found, dense_direction(gradients, 4, damp)) < 30 * precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_steps", [0, 2, 9], ids=["new", "not full", "wrapped"])
def test_a_saved_state_goes_on_bit_by_bit(dtype: torch.dtype, num_steps: int) -> None:
    def continued(parameters: Parameters, optimizer: MFAC) -> np.ndarray:
        for step in range(num_steps, num_steps + 6):
            draw_gradients(parameters, step)
            optimizer.step()
        return flat(parameters)

    parameters = new_parameters(torch.float32)
    optimizer = MFAC(parameters, 0.1, 4, DAMP, dtype)
    for step in range(num_steps):
        draw_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": parameters}, file)
    undisturbed = continued(parameters, optimizer)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(weight.detach()) for weight in saved["weights"]]
    resumed_optimizer = MFAC(resumed, 0.7, 4, DAMP, dtype)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    np.testing.assert_array_equal(continued(resumed, resumed_optimizer), undisturbed)


@pytest.mark.parametrize(("num_grads", "dtype"), [(5, torch.float32), (4, torch.bfloat16)])
def test_a_state_of_another_window_is_refused(num_grads: int, dtype: torch.dtype) -> None:
    parameters = new_parameters(torch.float32)
    optimizer = MFAC(parameters, 0.1, 4, DAMP)
    draw_gradients(parameters, step=0)
    optimizer.step()
    with pytest.raises(ValueError, match="window"):
        MFAC(parameters, 0.1, num_grads, DAMP, dtype).load_state_dict(optimizer.state_dict())


def test_nothing_as_large_as_the_window_is_made_beside_it() -> None:
    """Neither a converted copy of it nor, of course, a Fisher matrix."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            is_new = isinstance(result, torch.Tensor) and result.data_ptr() != window.data_ptr()
            largest = max(largest, result.numel() if is_new else 0)
            return result

    parameters = new_parameters(torch.float32)
    optimizer = MFAC(parameters, 0.1, 8, DAMP, torch.bfloat16)
    for step in range(9):
        draw_gradients(parameters, step)
        optimizer.step()
    window = optimizer.state["window"]["gradients"]
    with Watch():
        optimizer.step()
    assert 64 <= largest < window.numel() / 2


def test_equal_gradients_with_hardly_any_damping_give_no_larger_a_step_than_different_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In exact arithmetic equal ones give 1 / norm, different ones num_grads / norm."""
    monkeypatch.setattr(mfac, "_CPU_COLUMNS", 4096)
    parameters = [torch.nn.Parameter(torch.zeros(5000))]
    optimizer = MFAC(parameters, 1.0, 64, 1e-12)
    gradient = 10 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for _ in range(70):
        parameters[0].grad = gradient.clone()
        moved = moved_by(parameters, optimizer.step)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) < 64 / gradient.norm()


def test_a_gradient_that_is_no_number_shows_in_the_parameters() -> None:
    parameters = new_parameters(torch.float32)
    optimizer = MFAC(parameters, 0.1, 4, DAMP)
    draw_gradients(parameters, step=0)
    parameters[1].grad[2] = torch.nan
    optimizer.step()
    assert np.isnan(flat(parameters)).any()
