"""The training step on paper: the least that it costs, and what several machines should make of it.

    python benchmarks/step_model.py

Prints the computed tables of docs/performance.md. Nothing is measured here, and every assumption is a name below. Rows
are full ones of 128 tokens with 20 predictions, or as long as English Wikipedia's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import numpy as np
import torch

from benchmarks.gpu_rows import RowSource
from benchmarks.shared import markdown
from data_prep.shards import RowSizes
from pretrain.architecture import Architecture, ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Workload
from pretrain.flops import model_flops
from pretrain.model import MaskedLanguageModel
from pretrain.packing import pack

SOURCE = RowSource(vocab_size=30522, max_seq_length=128, max_predictions_per_seq=20)
FULL_ROW = RowSizes(np.array([128]), np.array([20]))
TRAIN_BATCH_SIZE = 4096
SAMPLED_STEPS = 16

# Bytes a parameter, weights, gradients and Adam's two moments in float32.
HELD = 16
READ_AND_WRITTEN_BY_ADAM = 28  # reads all four, writes all but the gradient
READ_AND_WRITTEN_BY_A_MICRO_BATCH = 14  # the gradient is added to (8), the weight cast to half precision (6)
READ_AND_WRITTEN_AROUND_AN_ALL_REDUCE = 16  # into DeepSpeed's one buffer and back

# Bytes a token and layer, in hidden sizes, counted along the model's forward pass where every chain of elementwise
# operations is one kernel, in half precision but for a float32 residual; a backward pass moves twice as much.
BY_MATRIX_PRODUCTS = 3 * 32
BESIDE_MATRIX_PRODUCTS = 3 * 64
KEPT_FOR_BACKWARD = 34  # Korthikanti et al. 2022, equation 1, without the attention matrices, which are not kept

UTILISATION = 0.45  # assumed share of the matrix products' rate, in forward and backward passes
ATTAINED = 0.8  # assumed share of a maker's figure, for matrix products and memory: 790 of 989 TFLOP/s on an H200


@dataclass(frozen=True)
class Machine:
    """GPUs that train together; figures a GPU, the maker's unless said otherwise."""

    name: str
    gpus: int
    tflops: float
    """Of dense matrix products in half precision."""
    memory_terabytes_per_second: float
    all_reduce_gigabytes_per_second: float
    """Assumed: what goes out of a GPU in an all-reduce over all of them."""
    micro_batch_size: int

    @property
    def matrix_product_rate(self) -> float:
        """Operations a second."""
        return ATTAINED * self.tflops * 1e12

    @property
    def memory_rate(self) -> float:
        """Bytes a second."""
        return ATTAINED * self.memory_terabytes_per_second * 1e12

    @property
    def plan(self) -> BatchPlan:
        """Of the recipe's batch."""
        return BatchPlan(TRAIN_BATCH_SIZE, self.micro_batch_size, self.gpus)


MACHINES = (
    Machine("8 x Titan-V, PCIe", 8, 110, 0.653, 8, 32),
    Machine("8 x A100, NVLink", 8, 312, 2.039, 240, 128),
    Machine("8 x H200, NVLink", 8, 989, 4.8, 360, 256),
    Machine("8 x 8 x H200, InfiniBand", 64, 989, 4.8, 320, 64),
)


def main() -> None:
    """Print the tables, and one line of JSON."""
    figures = {}
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
        figures[name] = text.splitlines()
    print(json.dumps(figures))


def tables() -> dict[str, str]:
    """Markdown by name."""
    return {"floor": floor_table(), **{preset: step_table(preset) for preset in ("bert-large", "bert-base")}}


def architecture_of(preset: str) -> Architecture:
    """BERT's vocabulary, sequences of 128."""
    return resolve(ModelConfig(preset=preset), SOURCE.vocab_size, SOURCE.max_seq_length, pad_token_id=0)


def num_parameters(architecture: Architecture) -> int:
    """All that are trained."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaskedLanguageModel(architecture).parameters())


def flops_per_sequence(architecture: Architecture, sizes: RowSizes) -> float:
    """The mean over rows of these sizes."""
    return model_flops(architecture, Workload.of(sizes)) / len(sizes.tokens)


@cache
def text_sizes() -> RowSizes:
    """Of some steps of realistic rows."""
    return SOURCE.realistic_rows(SAMPLED_STEPS * TRAIN_BATCH_SIZE, np.random.default_rng(1)).sizes


def floor_table() -> str:
    """What the arithmetic and the memory's traffic allow at best."""
    h200 = MACHINES[2]
    dense = RowSizes(FULL_ROW.tokens, FULL_ROW.tokens)
    rows: list[tuple[str, Callable[[Architecture], str]]] = [
        ("parameters", lambda a: f"{num_parameters(a) / 1e6:.1f} M"),
        ("operations a full row", lambda a: f"{flops_per_sequence(a, FULL_ROW) / 1e9:.1f} GFLOP"),
        ("the same with a dense head", lambda a: f"{flops_per_sequence(a, dense) / 1e9:.1f} GFLOP"),
        ("operations a row of Wikipedia (mean)", lambda a: f"{flops_per_sequence(a, text_sizes()) / 1e9:.1f} GFLOP"),
        ("weights, gradients, moments", lambda a: f"{HELD * num_parameters(a) / 1e9:.2f} GB"),
        ("kept for the backward pass, a full row", lambda a: f"{bytes_of_layers(a, KEPT_FOR_BACKWARD) / 1e6:.0f} MB"),
        ("traffic of matrix products, a full row", lambda a: f"{bytes_of_layers(a, BY_MATRIX_PRODUCTS) / 1e6:.0f} MB"),
        ("traffic of all else, a full row", lambda a: f"{bytes_of_layers(a, BESIDE_MATRIX_PRODUCTS) / 1e6:.0f} MB"),
        ("traffic of a micro-batch, whatever its size", lambda a: _traffic(a, READ_AND_WRITTEN_BY_A_MICRO_BATCH)),
        ("traffic of AdamW's step", lambda a: _traffic(a, READ_AND_WRITTEN_BY_ADAM)),
        ("H200, matrix products alone: full rows/s", lambda a: f"{1 / seconds_of_products(a, h200):,.0f}"),
        ("H200, and all else at memory's rate: full rows/s", lambda a: f"{1 / seconds_of_passes(a, h200):,.0f}"),
    ]
    models = [architecture_of(preset) for preset in ("bert-large", "bert-base")]
    lines = [[what, *(value(model) for model in models)] for what, value in rows]
    return markdown([["", "BERT-large", "BERT-base"], *lines])


def _traffic(architecture: Architecture, bytes_per_parameter: int) -> str:
    return f"{bytes_per_parameter * num_parameters(architecture) / 1e9:.2f} GB"


def bytes_of_layers(architecture: Architecture, hidden_sizes: int) -> float:
    """Of a full row, through all layers."""
    per_layer = hidden_sizes * architecture.hidden_size * SOURCE.max_seq_length
    return architecture.num_hidden_layers * per_layer


def seconds_of_products(architecture: Architecture, machine: Machine) -> float:
    """A full row's matrix products at the rate of large ones."""
    return flops_per_sequence(architecture, FULL_ROW) / machine.matrix_product_rate


def seconds_of_passes(architecture: Architecture, machine: Machine) -> float:
    """The same, and what is beside them at the memory's rate."""
    beside = bytes_of_layers(architecture, BESIDE_MATRIX_PRODUCTS) / machine.memory_rate
    return seconds_of_products(architecture, machine) + beside


@dataclass(frozen=True)
class Step:
    """One optimizer step of a machine, in seconds."""

    passes: float
    all_reduce: float
    update: float

    @property
    def seconds(self) -> float:
        """One after the other: nothing overlaps."""
        return self.passes + self.all_reduce + self.update

    @property
    def sequences_per_second(self) -> float:
        """Over all GPUs."""
        return TRAIN_BATCH_SIZE / self.seconds

    def days(self, sequences: float) -> float:
        """For that many."""
        return sequences / self.sequences_per_second / 86400


def all_reduce_bytes(parameters: int, gpus: int, bytes_per_gradient: int) -> float:
    """What each GPU sends in a ring: every gradient but its own share, once to sum it and once to spread the sum."""
    return 2 * (gpus - 1) / gpus * bytes_per_gradient * parameters


def step_of(
    architecture: Architecture, machine: Machine, sizes: RowSizes, idle: float, bytes_per_gradient: int
) -> Step:
    """The recipe's step.

    Args:
        architecture: of the model.
        machine: that it runs on.
        sizes: of the rows.
        idle: share of the passes that goes into padding and into waiting for a rank with one micro-batch more.
        bytes_per_gradient: on the wire; 4, or 2 with ``communication_data_type``.
    """
    parameters = num_parameters(architecture)
    flops = flops_per_sequence(architecture, sizes) * TRAIN_BATCH_SIZE / machine.gpus / (1 - idle)
    sent = all_reduce_bytes(parameters, machine.gpus, bytes_per_gradient)
    around = READ_AND_WRITTEN_AROUND_AN_ALL_REDUCE * parameters / machine.memory_rate
    return Step(
        passes=flops / (UTILISATION * machine.matrix_product_rate),
        all_reduce=sent / (machine.all_reduce_gigabytes_per_second * 1e9) + around,
        update=READ_AND_WRITTEN_BY_ADAM * parameters / machine.memory_rate,
    )


@cache
def idle_share(plan: BatchPlan) -> float:
    """Of the positions that all ranks compute, or wait for, in steps of realistic rows: those that hold no token."""
    shape, generator = SOURCE.packed_shape(plan), np.random.default_rng(2)
    computed = real = 0
    for _ in range(SAMPLED_STEPS):
        rows = SOURCE.realistic_rows(plan.train_batch_size, generator)
        micro_batches = sum(1 for _ in pack(rows, shape))
        computed += shape.slots * plan.world_size * -(-micro_batches // plan.world_size)
        real += int(rows.sizes.tokens.sum())
    return 1 - real / computed


def step_table(preset: str) -> str:
    """The recipe's step on every machine."""
    architecture, sizes = architecture_of(preset), text_sizes()
    columns = [_column(architecture, machine, sizes) for machine in MACHINES]
    names = list(columns[0])
    return markdown([["", *(machine.name for machine in MACHINES)], *([n, *(c[n] for c in columns)] for n in names)])


def _column(architecture: Architecture, machine: Machine, text: RowSizes) -> dict[str, str]:
    plan = machine.plan
    idle = idle_share(plan)
    full = step_of(architecture, machine, FULL_ROW, 0.0, bytes_per_gradient=4)
    ours = step_of(architecture, machine, text, idle, bytes_per_gradient=4)
    halved = step_of(architecture, machine, text, idle, bytes_per_gradient=2)
    sent = all_reduce_bytes(num_parameters(architecture), machine.gpus, bytes_per_gradient=4)
    return {
        "matrix products, TFLOP/s a GPU (assumed)": f"{machine.matrix_product_rate / 1e12:.0f}",
        "all-reduce, GB/s out of a GPU (assumed)": f"{machine.all_reduce_gigabytes_per_second:.0f}",
        "micro-batches a GPU": f"{plan.gradient_accumulation_steps} x {plan.micro_batch_size}",
        "padding and waiting": f"{idle:.1%}",
        "forward and backward passes": _milliseconds(ours.passes),
        "all-reduce: a GPU sends": f"{sent / 1e9:.2f} GB",
        "all-reduce: takes, float32": _milliseconds(ours.all_reduce),
        "AdamW's step": _milliseconds(ours.update),
        "step": _milliseconds(ours.seconds),
        "of it communication": f"{ours.all_reduce / ours.seconds:.1%}",
        "the same with 16 bits on the wire": f"{halved.all_reduce / halved.seconds:.1%}",
        "sequences/s, Wikipedia": f"{ours.sequences_per_second:,.0f}",
        "sequences/s, full rows": f"{full.sequences_per_second:,.0f}",
        "94 M sequences of Wikipedia": _duration(ours.days(94e6)),
        "256 M sequences of Wikipedia": _duration(ours.days(256e6)),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.02 else f"{1000 * seconds:.1f} ms"


def _duration(days: float) -> str:
    return f"{days:.3f} days ({24 * days:.1f} h)"


if __name__ == "__main__":
    main()
