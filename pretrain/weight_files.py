"""DeepSpeed's checkpoint files to whole float32 weights, read with torch alone: no engine, no other process, no GPU."""

import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of what it wraps


class _Fragment:
    """Where a parameter's part lies in the vector of one rank: DeepSpeed's ``fragment_address``."""

    start: int
    numel: int


class _Ignored:
    """What the weights don't depend on."""

    def __init__(self, *_: Any) -> None: ...


# All that is in the files besides tensors and plain values; instead of DeepSpeed's classes, these are made.
_CLASSES_IN_FILES = [
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def read_weights(folder: Path, zero_stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """The trained weights in float32, under the names that the model has uncompiled.

    At ZeRO stage 0 they are in the model's file. At stage 1 that may hold rounded copies, and the float32 weights that
    the optimizer works on lie in the files of the ranks, a part each.

    Args:
        folder: of a checkpoint.
        zero_stage: that it was saved at, 0 or 1.
        world_size: how many processes saved it.

    Raises:
        UserError: a file is missing, damaged or not DeepSpeed's.
    """
    saved, ranks = _open_files(folder, zero_stage, world_size)
    try:
        weights = _join_by_name(saved["param_shapes"], ranks) if zero_stage else saved["module"]
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"the files in {folder} are not as DeepSpeed writes them ({error!r})") from None
    return {name.replace(_COMPILED, ""): tensor.float() for name, tensor in weights.items()}


def check_whole(folder: Path, zero_stage: int, world_size: int) -> None:
    """Refuse a checkpoint that :func:`read_weights` would find incomplete, without reading it all."""
    _open_files(folder, zero_stage, world_size)


def _open_files(folder: Path, zero_stage: int, world_size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the model's file holds, and at stage 1 what each rank's optimizer does."""
    model_files = sorted(folder.glob("*_model_states.pt"))
    if not model_files:
        raise UserError(f"{folder} has no *_model_states.pt: the checkpoint is not whole")
    optimizer_files = _optimizer_files(folder, world_size) if zero_stage else []
    saved, *ranks = (_load(file) for file in (model_files[0], *optimizer_files))
    return saved, ranks


def _load(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_CLASSES_IN_FILES):
            # Mapped, so that the optimizer's moments, twice as much as the weights, are not read.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is damaged or not DeepSpeed's ({str(error).splitlines()[0]})") from None


def _optimizer_files(folder: Path, world_size: int) -> list[Path]:
    """One per rank, in the order of ranks."""
    found = {int(match[1]): file for file in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(file.name))}
    missing = sorted(set(range(world_size)) - found.keys())
    if missing:
        raise UserError(
            f"{folder} lacks the *_optim_states.pt of rank {missing[0]}: of {world_size} processes, each wrote a part"
        )
    return [found[rank] for rank in range(world_size)]


def _join_by_name(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """ZeRO 1: each rank has a slice of every group's vector, and tells which parameters are where in it."""
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for rank in ranks:
        state = rank["optimizer_state_dict"]
        vectors = state["single_partition_of_fp32_groups"]
        for vector, fragments in zip(vectors, state["param_slice_mappings"], strict=True):
            for name, fragment in fragments.items():
                parts[name].append(vector.narrow(0, fragment.start, fragment.numel))
    return {name: torch.cat(parts[name]).view(shape) for group in groups for name, shape in group.items()}
