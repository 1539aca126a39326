"""Floating-point operations: what a step needs by the model's arithmetic, and what the hardware can do."""

import time

import torch

from pretrain.architecture import Architecture
from pretrain.batches import Workload

_FORWARD_AND_BACKWARD = 3  # a backward pass makes two matrix products for each of the forward pass
_TIMED_PRODUCTS = 5


def model_flops(architecture: Architecture, workload: Workload) -> float:
    """Operations of a training step over ``workload``, forward and backward, a multiply-add counted as two.

    Counted are the matrix products that the model's definition asks for, over real tokens and real predictions: per
    token and layer 2 (4 h^2 + 2 h f) for the projections and the feed-forward network, 4 h per pair of tokens and layer
    for attention, 2 (h^2 + h v) per prediction for the head (h hidden size, f intermediate size, v vocabulary).
    Padding, recomputation, norms, activations and the optimizer count as nothing (Chowdhery et al. 2022, appendix B).
    """
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    layers = workload.tokens * 2 * (4 * hidden**2 + 2 * hidden * intermediate) + workload.token_pairs * 4 * hidden
    head = workload.predictions * 2 * hidden * (hidden + architecture.vocab_size)
    return float(_FORWARD_AND_BACKWARD * (architecture.num_hidden_layers * layers + head))


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in large square matrix products: the most that ``device`` gives a model in ``dtype``."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_seconds_of(lambda: left @ right, device) for _ in range(1 + _TIMED_PRODUCTS)]
    return 2 * size**3 / min(seconds[1:])


def _seconds_of(work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
