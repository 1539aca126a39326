"""M-FAC: gradients preconditioned by the inverse of the damped empirical Fisher matrix, without ever forming it.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (NeurIPS 2021),
the dynamic algorithm. With the last m gradients as the rows of G [m, d], the Fisher matrix is F = damp I + G^T G / m.
The paper keeps the Gram matrix G G^T, renews the one row and column that a new gradient changes, and eliminates the
m x m matrix m I + G G^T / damp (its D) anew in each step. Here that elimination is a Cholesky factorisation in float64.
A step's gradient g is the window's newest row, g = G^T e, for which the paper's sums become

    F^-1 g  =  m G^T (m damp I + G G^T)^-1 e

so that a step costs two products of the window with a vector, O(m d), and O(m^3) on the small matrix.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch

_CPU_COLUMNS: Final = 4096  # of a block: sums over them stay exact enough, and a block in a cache
_GPU_ELEMENTS: Final = 2**26  # there sums are trees anyway, and calls are what costs
_ROUNDINGS: Final = 64  # what sums may be off by, in units of their dtype's precision
_WINDOW: Final = "window"


class MFAC(torch.optim.Optimizer):
    """Steps by the preconditioned gradient, with decoupled weight decay as AdamW's.

    **While the window is not full**, gradients not seen yet count as zero and the mean is taken over ``num_grads`` all
    the same, as in the authors' implementation: so steps do not change in size when the window fills. Parameters
    without a gradient stay as they are.

    Rows are kept in units of their own, powers of two, so that float16 neither overflows nor loses small gradients.
    Sums are float32 (float64 in float64) within blocks of columns and float64 over them. m damp counts as no less than
    what such sums may be off by, 8e-6 of the window's largest squared norm (published settings, norms clipped to 1:
    m damp is 1e-3); otherwise the noise in equal gradients would be taken for curvature.

    The state is one entry, ``state["window"]``: ``gradients`` [blocks, num_grads, columns], so that a product with a
    block reads one stretch of memory; its ``units`` float64 [num_grads]; ``gram`` float64 [num_grads, num_grads] of the
    gradients as they are kept; and ``num_seen``. All of it is allocated in the first step, on the parameters' device,
    so that a state that is loaded before needs no room for two.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        num_grads: int = 1024,
        damp: float = 1e-6,
        gradient_dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.0,
    ) -> None:
        """Check nothing: :class:`finetune.optimizers.Optimizer` does.

        Args:
            params: parameters or groups of them, all on one device.
            lr: learning rate.
            num_grads: m, the gradients in the window.
            damp: the multiple of the identity that is added to the empirical Fisher matrix.
            gradient_dtype: what the gradients are kept in.
            weight_decay: share of a parameter, times the learning rate, that a step takes off.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._num_grads, self._damp, self._dtype = num_grads, damp, gradient_dtype
        self._sum_dtype = torch.promote_types(gradient_dtype, torch.float32)
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._sizes = [parameter.numel() for parameter in self._parameters]

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Take the parameters' gradients into the window, in place of the oldest ones, and move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        row, num_rows = self._add_gradient()
        direction = self._combine(self._coefficients(row, num_rows))
        pieces = iter(direction.split(self._sizes))
        for group in self.param_groups:
            for parameter in group["params"]:
                piece = next(pieces).view_as(parameter)
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(piece, alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, which moves to the parameters' device.

        Raises:
            ValueError: its window has another size or precision.
        """
        super().load_state_dict(state_dict)
        if _WINDOW not in self.state:
            return  # saved before the first step
        window, device = self.state[_WINDOW], self._parameters[0].device
        found, expected = window["gradients"], (*self._window_shape(), self._dtype)
        if (*found.shape, found.dtype) != expected:
            raise ValueError(f"the state's window is {(*found.shape, found.dtype)}, the optimizer's {expected}")
        self.state[_WINDOW] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in window.items()
        }

    def _window_shape(self) -> tuple[int, int, int]:
        """Blocks, gradients, columns of a block: hardly more columns in all than there are weights."""
        num_weights, on_cpu = sum(self._sizes), self._parameters[0].device.type == "cpu"
        num_blocks = math.ceil(num_weights / (_CPU_COLUMNS if on_cpu else max(1, _GPU_ELEMENTS // self._num_grads)))
        return num_blocks, self._num_grads, math.ceil(num_weights / num_blocks)

    def _window(self) -> dict[str, Any]:
        if _WINDOW not in self.state:
            num_grads, place = self._num_grads, {"device": self._parameters[0].device}
            self.state[_WINDOW] = {
                "gradients": torch.zeros(self._window_shape(), dtype=self._dtype, **place),
                "units": torch.ones(num_grads, dtype=torch.float64, **place),
                "gram": torch.zeros(num_grads, num_grads, dtype=torch.float64, **place),
                "num_seen": 0,
            }
        return self.state[_WINDOW]

    def _add_gradient(self) -> tuple[int, int]:
        """Write the gradient over the oldest row; that row, and how many are in use."""
        window = self._window()
        gradients, row = window["gradients"], window["num_seen"] % self._num_grads
        window["num_seen"] += 1
        num_blocks, _, num_columns = gradients.shape
        gradient = torch.zeros(num_blocks * num_columns, dtype=self._sum_dtype, device=gradients.device)
        for parameter, piece in zip(self._parameters, gradient[: sum(self._sizes)].split(self._sizes), strict=True):
            if parameter.grad is not None:
                piece.view_as(parameter).copy_(parameter.grad)
        exponent = torch.frexp(gradient.norm() / len(gradient) ** 0.5).exponent  # elements become about 1 in size
        window["units"][row] = torch.exp2(exponent.double())
        gradients[:, row] = gradient.mul_(torch.exp2(-exponent.to(gradient.dtype))).view(num_blocks, num_columns)
        return row, min(window["num_seen"], self._num_grads)

    def _coefficients(self, row: int, num_rows: int) -> torch.Tensor:
        """What each kept row contributes to the preconditioned gradient, float64 [num_rows]."""
        window = self._window()
        units, gram = window["units"][:num_rows], window["gram"]
        products = torch.zeros_like(units)
        for block in self._blocks(num_rows):
            products += torch.mv(block, block[row])
        gram[row, :num_rows] = gram[:num_rows, row] = products * units * units[row]
        system = gram[:num_rows, :num_rows].clone()
        rounding = _ROUNDINGS * torch.finfo(self._sum_dtype).eps * system.diagonal().max()
        system.diagonal().add_(rounding.clamp(min=self._num_grads * self._damp))
        factor, _ = torch.linalg.cholesky_ex(system)  # not a number where a gradient is none, as the loss will be then
        unit_vector = torch.zeros_like(units)
        unit_vector[row] = self._num_grads
        return torch.cholesky_solve(unit_vector[:, None], factor).squeeze(1) * units

    def _combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The sum of the kept rows, each times its coefficient, [d]."""
        gradients, weights = self._window()["gradients"], coefficients.to(self._sum_dtype)
        combined = torch.empty(len(gradients), gradients.shape[2], dtype=self._sum_dtype, device=gradients.device)
        for block, columns in zip(self._blocks(len(weights)), combined, strict=True):
            torch.mv(block.T, weights, out=columns)
        return combined.flatten()[: sum(self._sizes)]

    def _blocks(self, num_rows: int) -> Iterator[torch.Tensor]:
        """The rows in use, block by block, [num_rows, columns] in the dtype of sums.

        Rows of 16 bits are converted one block at a time, into one small buffer: valid until the next block.
        """
        gradients = self._window()["gradients"]
        if gradients.dtype == self._sum_dtype:
            yield from gradients[:, :num_rows]
            return
        buffer = torch.empty(num_rows, gradients.shape[2], dtype=self._sum_dtype, device=gradients.device)
        for block in gradients[:, :num_rows]:
            yield buffer.copy_(block)
