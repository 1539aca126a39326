"""LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2."""

from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """Adam's update, scaled in every parameter to that parameter's own norm.

    Weight decay is part of the update that the trust ratio scales. The ratio is that of the norms (the paper's scaling
    function is the identity), and 1 where either norm is zero and in groups whose ``layer_adaptation`` is False: the
    authors leave it off biases and LayerNorms. Nothing is read back from the device.

    Args:
        params: parameters or groups of them, as any optimizer of torch takes them.
        lr: learning rate.
        betas: decay of the gradient's mean and of its squares.
        eps: added to Adam's denominator.
        weight_decay: share of the parameter that is added to Adam's update.
        layer_adaptation: whether updates are scaled by the trust ratio.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        layer_adaptation: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay, "layer_adaptation": layer_adaptation})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                updates = self._adam_updates(params, *group["betas"], group["eps"])
                if group["weight_decay"]:
                    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                if group["layer_adaptation"]:
                    torch._foreach_mul_(updates, _trust_ratios(params, updates))
                torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _adam_updates(self, params: list[torch.Tensor], beta1: float, beta2: float, eps: float) -> list[torch.Tensor]:
        states = [self._state_of(p) for p in params]
        grads = [p.grad for p in params]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(squares, [1 - beta2 ** state["step"] for state in states])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, eps)
        updates = torch._foreach_div(means, [1 - beta1 ** state["step"] for state in states])
        torch._foreach_div_(updates, denominators)
        return list(updates)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _trust_ratios(params: list[torch.Tensor], updates: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norm of the parameter over norm of the update, a scalar on the device for each."""
    param_norms, update_norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
    usable = (param_norms > 0) & (update_norms > 0)
    return list(torch.where(usable, param_norms / update_norms, 1.0).unbind())
