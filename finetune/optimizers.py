"""The choice of optimizers, their arguments, and the memory that they need."""

import bisect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import torch

from common.errors import UserError
from finetune.mfac import MFAC

OptimizerName = Literal["adamw", "mfac"]
GradientDtype = Literal["fp32", "bf16", "fp16"]

_DEFAULTS: Final[dict[OptimizerName, dict[str, Any]]] = {
    "adamw": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "mfac": {"num_grads": 1024, "damp": 1e-6, "gradient_dtype": "fp32"},
}
_OPTIM_NAMES: Final[dict[str, OptimizerName]] = {  # run_glue's own among them
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    "mfac": "mfac",
}
_TORCH_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POSSIBLE: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "adam_beta1": (lambda value: 0 <= value < 1, "0 or more, below 1"),
    "adam_beta2": (lambda value: 0 <= value < 1, "0 or more, below 1"),
    "adam_epsilon": (lambda value: 0 < value < math.inf, "above 0"),
    "num_grads": (lambda value: value >= 1, "1 or more"),
    "damp": (lambda value: 0 < value < math.inf, "above 0"),
    "gradient_dtype": (lambda value: value in _TORCH_DTYPES, "one of fp32, bf16, fp16"),
}
_GIB: Final = 2**30
_PROCESS_BYTES: Final = 2**30  # Python with its libraries, and the activations of a batch
_BYTES_PER_PARAMETER: Final = 12  # the weight, its gradient, and what a step adds to it


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and its own arguments, which the learning rate is not among."""

    name: OptimizerName = "adamw"
    """adamw (decoupled weight decay), or mfac: the gradient times the inverse of the damped empirical Fisher matrix of
    the last gradients (Frantar, Kurtic, Alistarh 2021)"""
    adam_beta1: float | None = None
    """adamw: decay of the running mean of gradients; default: 0.9"""
    adam_beta2: float | None = None
    """adamw: decay of the running mean of squared gradients; default: 0.999"""
    adam_epsilon: float | None = None
    """adamw: added to the denominator; default: 1e-8"""
    num_grads: int | None = None
    """mfac: gradients that are kept, each as large as the model; default: 1024"""
    damp: float | None = None
    """mfac: the multiple of the identity that is added to the Fisher matrix; default: 1e-6"""
    gradient_dtype: GradientDtype | None = None
    """mfac: what gradients are kept in: fp32, bf16 or fp16; default: fp32"""

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            raise ValueError(f"there is no optimizer '{self.name}'; there are: {', '.join(_DEFAULTS)}")
        for name, value in self._given.items():
            if name not in _DEFAULTS[self.name]:
                raise ValueError(f"{self.name} has no argument {name}; it has: {', '.join(_DEFAULTS[self.name])}")
            is_possible, possible = _POSSIBLE[name]
            if not is_possible(value):
                raise ValueError(f"{name} is {value}: it must be {possible}")

    @property
    def arguments(self) -> dict[str, Any]:
        """All that the optimizer has, defaults included."""
        return {**_DEFAULTS[self.name], **self._given}

    @property
    def title(self) -> str:
        """For tables, such as "AdamW" or "M-FAC 64 gradients in bf16": no two that differ have the same."""
        different = {name: value for name, value in self.arguments.items() if value != _DEFAULTS[self.name][name]}
        title = "AdamW"
        if self.name == "mfac":
            dtype, _ = different.pop("gradient_dtype", None), different.pop("num_grads", None)
            title = f"M-FAC {self.arguments['num_grads']} gradients" + (f" in {dtype}" if dtype else "")
        return ", ".join([title, *(f"{name.removeprefix('adam_')} {value!r}" for name, value in different.items())])

    def build(self, parameter_groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer of these groups, which may set ``weight_decay``; all their parameters lie on one device."""
        arguments = self.arguments
        if self.name == "mfac":
            dtype = _TORCH_DTYPES[arguments["gradient_dtype"]]
            return MFAC(parameter_groups, learning_rate, arguments["num_grads"], arguments["damp"], dtype)
        betas = arguments["adam_beta1"], arguments["adam_beta2"]
        # Fused is half a small model's time.
        return torch.optim.AdamW(
            parameter_groups, lr=learning_rate, betas=betas, eps=arguments["adam_epsilon"], fused=True
        )

    def state_bytes(self, num_parameters: int) -> int:
        """Memory of the state for a model of that size: two moments, or the window and its float64 Gram matrix."""
        if self.name == "adamw":
            return 2 * 4 * num_parameters
        num_grads, dtype = self.arguments["num_grads"], _TORCH_DTYPES[self.arguments["gradient_dtype"]]
        return num_grads * (dtype.itemsize * num_parameters + 8 * num_grads + 8)

    @property
    def _given(self) -> dict[str, Any]:
        return {field.name: value for field in fields(self)[1:] if (value := getattr(self, field.name)) is not None}


def parse_optim(optim: str, optim_args: str | None) -> tuple[Optimizer, float | None]:
    """The optimizer that ``--optim`` and ``--optim_args`` name, and the learning rate if it is among the arguments.

    Args:
        optim: mfac, adamw, or run_glue's names for AdamW, in any case.
        optim_args: JSON (``{"lr": 1e-4, "num_grads": 64}``) or run_glue's form (``num_grads=64,damp=1e-6``).

    Raises:
        UserError: there is no such optimizer, it has no such argument, or a value is impossible.
    """
    if optim.lower() not in _OPTIM_NAMES:
        raise UserError(f"--optim: there is no optimizer '{optim}'; there are: {', '.join(_OPTIM_NAMES)}")
    name = _OPTIM_NAMES[optim.lower()]
    arguments = _read_arguments(optim_args)
    known = ["lr", *_DEFAULTS[name]]
    for argument in arguments:
        if argument not in known:
            raise UserError(f"--optim_args: {name} has no argument '{argument}'; it has: {', '.join(known)}")
    values = {argument: _convert(argument, value) for argument, value in arguments.items()}
    learning_rate = values.pop("lr", None)
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError(f"--optim_args: lr is {learning_rate}: it must be above 0")
    try:
        return Optimizer(name, **values), learning_rate
    except ValueError as error:
        raise UserError(f"--optim_args: {error}") from None


def _read_arguments(text: str | None) -> dict[str, Any]:
    if not text or not text.strip():
        return {}
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--optim_args is no JSON ({error}): {text}") from None
    pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--optim_args takes JSON, or name=value,name=value, not: {text}")
    return dict(pairs)


def _convert(name: str, value: Any) -> float | int | str:
    """The argument's type from JSON's or a text."""
    if name == "gradient_dtype":
        return str(value)
    try:
        number = float(value)
        if isinstance(value, bool) or (name == "num_grads" and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError):
        wanted = "a whole number" if name == "num_grads" else "a number"
        raise UserError(f"--optim_args: {name} is {value!r}: it must be {wanted}") from None
    return int(number) if name == "num_grads" else number


def check_memory(optimizer: Optimizer, num_parameters: int, device: torch.device, num_at_a_time: int) -> None:
    """Refuse M-FAC where its window would not fit, before any work; AdamW always passes.

    Args:
        optimizer: the optimizer of all trials.
        num_parameters: of a classifier.
        device: where trials run: memory that is available now on a CPU, a GPU's whole memory.
        num_at_a_time: trials that run there side by side.

    Raises:
        UserError: what is needed, what there is, and what would fit.
    """
    if optimizer.name != "mfac":
        return
    available, needed = _available_bytes(device) // num_at_a_time, _needed_bytes(optimizer, num_parameters)
    if needed > available:
        each = f" for each of {num_at_a_time} trials at a time" if num_at_a_time > 1 else ""
        raise UserError(
            f"{optimizer.title}, {num_parameters:,} parameters: that needs {needed / _GIB:.1f} GiB of memory{each}, and"
            f" there are {available / _GIB:.1f} GiB{each and ' for each'} on the {device.type.upper()}:"
            f" {_what_fits(optimizer, num_parameters, available)}"
        )


def _needed_bytes(optimizer: Optimizer, num_parameters: int) -> int:
    """Of a process that trains with it."""
    return optimizer.state_bytes(num_parameters) + _BYTES_PER_PARAMETER * num_parameters + _PROCESS_BYTES


def _what_fits(optimizer: Optimizer, num_parameters: int, available: int) -> str:
    """The most gradients, as they are kept now and in bf16."""

    def fitting(dtype: GradientDtype) -> int:
        def needed(num_grads: int) -> int:
            return _needed_bytes(replace(optimizer, num_grads=num_grads, gradient_dtype=dtype), num_parameters)

        return bisect.bisect_right(range(1, optimizer.arguments["num_grads"] + 1), available, key=needed)

    numbers = {dtype: fitting(dtype) for dtype in dict.fromkeys((optimizer.arguments["gradient_dtype"], "bf16"))}
    fits = [f"num_grads {number} in {dtype}" for dtype, number in numbers.items() if number]
    return f"{' or '.join(fits)} would fit" if fits else "not even one gradient fits, take adamw"


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = _left_in_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([psutil.virtual_memory().available, *limits])


def _left_in_cgroups(membership: Path, root: Path) -> Iterator[int]:
    """What each limit above this process leaves, in bytes; pages that only cache files count as free."""
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            top, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            top, limit_name, usage_name = root, "memory.max", "memory.current"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top) or not (folder / limit_name).is_file():
                continue
            limit = (folder / limit_name).read_text().strip()
            if limit != "max":
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = int(statistics["active_file"]) + int(statistics["inactive_file"])
                yield int(limit) - int((folder / usage_name).read_text()) + cached
