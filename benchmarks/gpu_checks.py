"""Whether the GPU's steps are right, before anything says how fast they are."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.gpu_rows import to_batch
from benchmarks.gpu_speed import Bench
from benchmarks.gpu_timing import release_memory, say
from pretrain.architecture import Architecture, ModelConfig
from pretrain.batch_plan import BatchPlan, MicroBatchShape
from pretrain.ds_config import DS_CONFIGS, load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.kernels import Kernels, apply_kernels
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.packing import MicroBatch

_SEQUENCES = 16
_SLOTS_MULTIPLE = 16
_STEPS_TO_SURVIVE_IN = 30


@dataclass(frozen=True)
class Tolerance:
    """How far two steps may be apart."""

    loss: float
    """Relative."""
    gradient_norm: float
    """Relative."""
    gradient: float
    """Length of the difference over length of the gradient."""


ROUNDING = Tolerance(1e-5, 1e-4, 1e-4)  # other orders of the same float32 sums
HALF_PRECISION = Tolerance(5e-3, 2e-2, 5e-2)  # matrix products in bf16 or fp16 against float32
OTHER_KERNELS = Tolerance(2e-3, 1e-2, 5e-2)  # both in half precision, rounded in other places


@dataclass(frozen=True)
class Gradient:
    """What a forward and backward pass comes to."""

    loss: float
    """Summed over the predictions."""
    flat: torch.Tensor
    """All parameters', float32 on the CPU."""

    def against(self, other: "Gradient", what: str, tolerance: Tolerance) -> dict[str, Any]:
        """A line of the record."""
        norm, other_norm, distance = (
            torch.linalg.vector_norm(vector, dtype=torch.float64).item()
            for vector in (self.flat, other.flat, self.flat - other.flat)
        )
        apart = Tolerance(
            loss=abs(self.loss - other.loss) / abs(other.loss),
            gradient_norm=abs(norm - other_norm) / other_norm,
            gradient=distance / other_norm,
        )
        agrees = all(asdict(apart)[name] <= limit for name, limit in asdict(tolerance).items())
        return {"check": what, "agrees": agrees, **asdict(apart), "tolerance": asdict(tolerance)}


class GradientOf:
    """The gradient of one model on the same rows, computed in one way or another. No dropout.

    Args:
        bench: what every measurement needs.
        config: the model; its dropout is left out.
    """

    def __init__(self, bench: Bench, config: ModelConfig) -> None:
        self._hardware = bench.hardware
        self._source = bench.source
        self.architecture = bench.architecture(
            replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
        torch.manual_seed(0)
        self._weights = MaskedLanguageModel(self.architecture).state_dict()
        self._rows = bench.source.realistic_rows(_SEQUENCES, np.random.default_rng(1))

    def on_the_cpu(self) -> Gradient:
        """Padded, in float32: the reference."""
        return self._pass(self._model(torch.device("cpu")), self._micro_batch("padded"), None)

    def on_the_device(self, rows: str, kernels: Kernels, dtype: torch.dtype) -> Gradient:
        """``rows`` padded or packed.

        Raises:
            UserError: the kernels are not here.
        """
        device = self._hardware.device
        model = self._model(device)
        apply_kernels(model, kernels, device, None if dtype == torch.float32 else dtype, _SEQUENCES, dropout_seed=0)
        gradient = self._pass(model, self._micro_batch(rows), dtype)
        del model
        release_memory(device)
        return gradient

    def _model(self, device: torch.device) -> MaskedLanguageModel:
        model = MaskedLanguageModel(self.architecture)
        model.load_state_dict(self._weights)
        return model.to(device)

    def _micro_batch(self, rows: str) -> MicroBatch:
        shape = self._source.padded_shape(_SEQUENCES)
        if rows == "packed":
            slots = (int(self._rows.sizes.tokens.sum()) // _SLOTS_MULTIPLE + 1) * _SLOTS_MULTIPLE
            shape = MicroBatchShape(_SEQUENCES, self._source.max_seq_length, slots, shape.predictions)
        (micro_batch,) = to_batch(self._rows, shape, self._hardware.device).micro_batches
        return micro_batch

    def _pass(self, model: MaskedLanguageModel, micro_batch: MicroBatch, dtype: torch.dtype | None) -> Gradient:
        device = model.head.bias.device
        half = dtype not in (None, torch.float32)
        with torch.autocast(device.type, dtype if half else None, enabled=half):
            loss = model(*micro_batch.model_inputs(device))
        loss.backward()  # of the sum: the mean's gradients would be too small for fp16
        flat = torch.cat([parameter.grad.float().flatten().cpu() for parameter in model.parameters()])
        return Gradient(loss.item(), flat)


def steps_agree(bench: Bench, config: ModelConfig) -> list[dict[str, Any]]:
    """Every way to compute a gradient against the plainest one: a line for each comparison."""
    gradient_of, attempts = GradientOf(bench, config), bench.attempts
    reference = gradient_of.on_the_cpu()
    plain: dict[tuple[str, torch.dtype], Gradient] = {}
    checks = []
    for rows, kernels, dtype in _ways(bench.hardware.dtype):
        what = f"{rows}, {kernels}, {str(dtype).removeprefix('torch.')}"
        say(f"correctness: {what} ...")
        found = attempts.of(what, lambda: gradient_of.on_the_device(rows, kernels, dtype))  # noqa: B023
        if found is None:
            continue
        tolerance = ROUNDING if dtype == torch.float32 else HALF_PRECISION
        checks.append(found.against(reference, f"{what} against float32 on the CPU", tolerance))
        if kernels == "eager":
            plain[rows, dtype] = found
        elif (rows, dtype) in plain:
            checks.append(found.against(plain[rows, dtype], f"{what} against eager", OTHER_KERNELS))
    for dtype, tolerance in ((torch.float32, ROUNDING), (bench.hardware.dtype, OTHER_KERNELS)):
        packed, padded = plain.get(("packed", dtype)), plain.get(("padded", dtype))
        if packed and padded:
            what = f"packed against padded, {str(dtype).removeprefix('torch.')}"
            checks.append(packed.against(padded, what, tolerance))
    return checks


def _ways(dtype: torch.dtype) -> Iterator[tuple[str, Kernels, torch.dtype]]:
    """(rows, kernels, precision): float32, then the precision of training with all the kernels that there are."""
    for name in get_args(Kernels):
        if name == "auto":
            continue
        precisions = {"eager": (torch.float32, dtype), "deepspeed": (torch.float16,)}.get(name, (dtype,))
        for precision in precisions:
            for rows in ("padded", "packed"):
                yield rows, name, precision


def fp16_overflow(bench: Bench, config: ModelConfig) -> dict[str, Any]:
    """Make fp16 gradients overflow in DeepSpeed's engine: the step is left out, the loss scale goes down, and training
    goes on.
    """
    architecture, hardware = bench.architecture(config), bench.hardware
    shape = bench.source.padded_shape(_SEQUENCES)
    batch = to_batch(bench.source.full_rows(_SEQUENCES, np.random.default_rng(2)), shape, hardware.device)
    engine = _fp16_engine(architecture, bench)
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    left_out, kept = 0, True
    # As if all predictions were one: their gradients at the first loss scale, 65,536, are beyond fp16.
    while not (applied := engine.train_step(batch.micro_batches, 1, 1.0, 0).applied):
        left_out += 1
        kept &= all(map(torch.equal, before, engine.model.parameters()))
        if left_out == _STEPS_TO_SURVIVE_IN:
            break
    after = engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, 0)
    survives = left_out > 0 and kept and applied and after.applied and engine.has_finite_weights()
    return {"check": "fp16 overflow", "agrees": survives, "steps_left_out": left_out, "weights_kept": kept}


def _fp16_engine(architecture: Architecture, bench: Bench) -> PretrainEngine:
    model = MaskedLanguageModel(architecture).to(bench.hardware.device)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-4))
    plan = BatchPlan(_SEQUENCES, _SEQUENCES, world_size=1)
    return PretrainEngine(
        model, optimizer, load_ds_config(str(DS_CONFIGS / "fp16.json")), plan, 0.0, bench.hardware.processes
    )
