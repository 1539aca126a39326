"""DeepSpeed's part of the configuration: precision, ZeRO and communication, from a JSON file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"
_BF16_SINCE = (8, 0)  # CUDA capability: Ampere
_OURS = (  # set in the pretraining configuration
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler "
    "managed_gradient_accumulation"
).split()
_DEEPSPEEDS = (
    "zero_optimization torch_autocast bf16 fp16 data_types communication_data_type prescale_gradients "
    "gradient_predivide_factor wall_clock_breakdown comms_logger flops_profiler"
).split()
_SECTIONS = ("zero_optimization", "torch_autocast", "bf16", "fp16", "data_types")
_OF_ZERO = (
    "stage reduce_bucket_size allgather_bucket_size allgather_partitions reduce_scatter contiguous_gradients"
).split()
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration; ``auto`` picks bf16, fp16 or cpu by the hardware.

    Raises:
        UserError: there is no such file, it holds what does not belong there, or a precision that the hardware lacks.
    """
    path = DS_CONFIGS / f"{_hardware_precision()}.json" if name == "auto" else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(file.name for file in DS_CONFIGS.glob("*.json")))
        raise UserError(f"ds_config {name} can't be read: give 'auto' or a file; ds_configs/ has {known}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    for problem in _problems(config):
        raise UserError(f"ds_config {path} {problem}")
    _check_hardware(config)
    return config


def zero_stage(ds_config: dict[str, Any]) -> int:
    """What DeepSpeed shards: 0 nothing, 1 the optimizer's state."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def autocast_dtype(ds_config: dict[str, Any]) -> torch.dtype | None:
    """The type that matrix products run in, None for float32."""
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if _is_enabled(ds_config, precision):
            return dtype
    return _DTYPES[ds_config["torch_autocast"]["dtype"]] if _is_enabled(ds_config, "torch_autocast") else None


def has_half_precision_weights(ds_config: dict[str, Any]) -> bool:
    """Whether the model itself is in bf16 or fp16, rather than its matrix products alone."""
    return _is_enabled(ds_config, "bf16") or _is_enabled(ds_config, "fp16")


def _is_enabled(ds_config: dict[str, Any], section: str) -> bool:
    return bool(ds_config.get(section, {}).get("enabled"))


def _problems(config: Any) -> Iterator[str]:
    """What is wrong with a configuration, first things first."""
    if not isinstance(config, dict):
        yield "is not a JSON object of DeepSpeed's settings"
    if ours := [key for key in _OURS if key in config]:
        yield f"sets {', '.join(ours)}: set it in the pretraining configuration instead"
    if unknown := [key for key in config if key not in _DEEPSPEEDS]:
        yield f"has {unknown[0]}, which is not one of {', '.join(_DEEPSPEEDS)}"
    for section in _SECTIONS:
        if not isinstance(config.get(section, {}), dict):
            yield f"has {section} {json.dumps(config[section])}, which must be an object of settings"
    if unknown := [key for key in config.get("zero_optimization", {}) if key not in _OF_ZERO]:
        yield f"has zero_optimization.{unknown[0]}, which is not one of {', '.join(_OF_ZERO)}"
    stage = zero_stage(config)
    if type(stage) is not int or stage not in (0, 1):
        yield (
            f"has ZeRO stage {json.dumps(stage)}: only 0 and 1 can be, as processes may make different numbers of "
            "micro-batches, and a BERT's weights and gradients need no sharding"
        )
    yield from _problems_of_precision(config, stage)


def _problems_of_precision(config: dict[str, Any], stage: int) -> Iterator[str]:
    enabled = [section for section in ("torch_autocast", "bf16", "fp16") if _is_enabled(config, section)]
    if len(enabled) > 1:
        yield f"enables {' and '.join(enabled)}: take one of them"
    dtype = config.get("torch_autocast", {}).get("dtype")
    if "torch_autocast" in enabled and dtype not in _DTYPES:
        yield f"has torch_autocast.dtype {json.dumps(dtype)}, which must be one of {', '.join(_DTYPES)}"
    if stage == 0 and has_half_precision_weights(config):
        yield f"has {enabled[0]} weights at ZeRO stage 0, which keeps no float32 ones: take torch_autocast, or stage 1"
    if stage == 0 and config.get("data_types"):
        yield "has data_types, which need ZeRO stage 1"


def _hardware_precision() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return "bf16" if torch.cuda.get_device_capability() >= _BF16_SINCE else "fp16"


def _check_hardware(ds_config: dict[str, Any]) -> None:
    """Refuse what the hardware lacks, or would only imitate slowly."""
    if torch.cuda.is_available():
        lacking = autocast_dtype(ds_config) == torch.bfloat16 and _hardware_precision() != "bf16"
        if lacking:
            raise UserError(f"ds_config asks for bf16, which {torch.cuda.get_device_name()} lacks: take ds_config auto")
    elif _is_enabled(ds_config, "fp16"):
        raise UserError("ds_config asks for fp16 weights, which need a GPU: take ds_config auto")
