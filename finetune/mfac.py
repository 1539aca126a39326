"""M-FAC: gradients preconditioned by the inverse of the damped empirical Fisher matrix, without ever forming it.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (NeurIPS 2021),
the dynamic algorithm. With the last m gradients as the rows of G [m, d], the Fisher matrix is F = damp I + G^T G / m.
The paper keeps the Gram matrix G G^T, renews the one row and column that a new gradient changes, and eliminates the
m x m matrix m I + G G^T / damp (its D) anew in each step. Here that elimination is a Cholesky factorisation in float64.
A step's gradient g is the window's newest row, g = G^T e, for which the paper's sums become

    F^-1 g  =  m G^T (m damp I + G G^T)^-1 e

so that a step costs two products of the window with a vector, O(m d), and O(m^3) on the small matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch

_CPU_COLUMNS: Final = 4096  # of the window, taken at a time: sums stay exact enough, and a block in a cache
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

    The state is one entry, ``state["window"]``: ``gradients`` [num_grads, d], its ``units`` float64 [num_grads],
    ``gram`` float64 [num_grads, num_grads] of the gradients as they are kept, and ``num_seen``. All of it is allocated
    in the first step, on the parameters' device, so that a state that is loaded before needs no room for two.
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
        found, expected = window["gradients"], (self._num_grads, sum(self._sizes), self._dtype)
        if (*found.shape, found.dtype) != expected:
            raise ValueError(f"the state's window is {(*found.shape, found.dtype)}, the optimizer's {expected}")
        self.state[_WINDOW] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in window.items()
        }

    def _window(self) -> dict[str, Any]:
        if _WINDOW not in self.state:
            num_grads, place = self._num_grads, {"device": self._parameters[0].device}
            self.state[_WINDOW] = {
                "gradients": torch.zeros(num_grads, sum(self._sizes), dtype=self._dtype, **place),
                "units": torch.ones(num_grads, dtype=torch.float64, **place),
                "gram": torch.zeros(num_grads, num_grads, dtype=torch.float64, **place),
                "num_seen": 0,
            }
        return self.state[_WINDOW]

    def _add_gradient(self) -> tuple[int, int]:
        """Write the gradient over the oldest row, straight from where it lies; that row, and how many are in use."""
        window = self._window()
        gradients, row = window["gradients"], window["num_seen"] % self._num_grads
        window["num_seen"] += 1
        norm = torch.nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None)
        exponent = torch.frexp(norm / gradients.shape[1] ** 0.5).exponent  # elements become about 1 in size
        window["units"][row] = torch.exp2(exponent.double())
        for parameter, kept in zip(self._parameters, gradients[row].split(self._sizes), strict=True):
            if parameter.grad is None:
                kept.zero_()
            else:
                torch.mul(parameter.grad, torch.exp2(-exponent.to(norm.dtype)), out=kept.view_as(parameter))
        return row, min(window["num_seen"], self._num_grads)

    def _coefficients(self, row: int, num_rows: int) -> torch.Tensor:
        """What each kept row contributes to the preconditioned gradient, float64 [num_rows]."""
        window = self._window()
        units, gram = window["units"][:num_rows], window["gram"]
        products = torch.zeros_like(units)
        for _, block in self._blocks(num_rows):
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
        combined = torch.empty(gradients.shape[1], dtype=self._sum_dtype, device=gradients.device)
        for columns, block in self._blocks(len(coefficients)):
            torch.mv(block.T, weights, out=combined[columns])
        return combined

    def _blocks(self, num_rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The window in blocks of columns: where, and [num_rows, columns] in the dtype of sums.

        Rows of 16 bits are converted block by block, into one small buffer: valid until the next block.
        """
        gradients = self._window()["gradients"]
        width = _CPU_COLUMNS if gradients.device.type == "cpu" else max(1, _GPU_ELEMENTS // num_rows)
        converts = gradients.dtype != self._sum_dtype
        buffer = torch.empty(num_rows * width if converts else 0, dtype=self._sum_dtype, device=gradients.device)
        for start in range(0, gradients.shape[1], width):
            columns = slice(start, start + width)
            block = gradients[:num_rows, columns]
            yield columns, buffer[: block.numel()].view(block.shape).copy_(block) if converts else block
