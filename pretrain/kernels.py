"""Which kernels run the model's operations; weights and checkpoints are the same with all of them."""

from typing import Literal

import torch

from common.errors import UserError
from pretrain.model import MaskedLanguageModel

Kernels = Literal["auto", "eager", "compile", "apex", "deepspeed"]


def check_kernels(kernels: Kernels, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
    """Refuse what can be seen to be impossible before anything starts.

    Raises:
        UserError: the hardware is missing, or the precision does not fit.
    """
    if kernels in ("apex", "deepspeed") and device.type != "cuda":
        raise UserError(f"kernels {kernels} need an NVIDIA GPU, and this run has none: take kernels auto")
    if kernels == "deepspeed" and autocast_dtype == torch.bfloat16:
        raise UserError("kernels deepspeed know fp16 and fp32 only, and ds_config has bf16: take ds_configs/fp16.json")


def apply_kernels(
    model: MaskedLanguageModel,
    kernels: Kernels,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    sequences: int,
    dropout_seed: int,
) -> str:
    """Have ``model`` run on ``kernels`` from now on; returns which ones these are.

    Args:
        model: on ``device``; keeps its parameters, their names and their order.
        kernels: ``auto`` is ``compile`` on CUDA and ``eager`` on a CPU.
        device: of this process.
        autocast_dtype: of matrix products, None for that of the weights.
        sequences: at most, in a micro-batch.
        dropout_seed: of this process, for kernels that PyTorch does not seed.

    Raises:
        UserError: a package or a compiler is missing.
    """
    if kernels == "auto":
        kernels = "compile" if device.type == "cuda" else "eager"
    match kernels:
        case "compile":
            _check_compiler(device)
            # Not model.compile(), which also traces the hooks that DeepSpeed hangs on the model. The whole model, not
            # a layer at a time: residual, dropout and the next layer's LayerNorm become one kernel.
            model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        case "apex":
            _use_apex(model)
        case "deepspeed":
            from pretrain.kernels_deepspeed import use_deepspeed  # takes seconds, which only its users should spend

            use_deepspeed(model, sequences, autocast_dtype, dropout_seed)
    return kernels


def _check_compiler(device: torch.device) -> None:
    """Compile something small, which finds out whether Triton, a C++ compiler and a GPU that they know are there."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"kernels compile: torch.compile does not work here ({what}): take kernels eager") from error


def _use_apex(model: MaskedLanguageModel) -> None:
    try:
        from pretrain.kernels_apex import use_apex

        use_apex(model)
    except ImportError as error:
        raise UserError(
            f"kernels apex need NVIDIA's apex, built with its CUDA extensions from github.com/NVIDIA/apex ({error}): "
            "the package of that name on PyPI is an unrelated web toolkit; or take kernels auto"
        ) from error
