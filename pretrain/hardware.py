"""GPUs by name, and what a run would take on them: computed from published figures and assumptions, never measured.

What is assumed has a name here. Communication between GPUs is left out: docs/performance.md has it on paper.
"""

from dataclasses import dataclass

from common.errors import UserError
from pretrain.architecture import Architecture
from pretrain.batch_plan import BatchPlan
from pretrain.data_sample import DataSample
from pretrain.flops import model_flops
from pretrain.forecast import Durations, Estimate

# Of the maker's rate, over a whole step. 24hBERT's BERT-large on 8 Titan-V (their Table 1: 136 padded rows a second and
# GPU) comes to 30 %, NVIDIA's DeepLearningExamples on an A100 (580 rows a second, phase 1) to 45 %.
MODEST_UTILISATION = 0.30
GOOD_UTILISATION = 0.45

LAUNCH_SECONDS = 20.0  # until the processes have found each other
STARTING_SECONDS = 60.0  # micro-batch search included
COMPILE_SECONDS = 90.0
DISK_BYTES_PER_SECOND = 1e9
EXPORT_SECONDS = 30.0  # besides writing: the exported model is loaded and compared
FORWARD_SHARE = 1 / 3  # of a forward and backward pass
LOG_LINE_BYTES = 1000  # in metrics.jsonl and TensorBoard's file together

HELD_BYTES = 16  # a parameter: weight, gradient and Adam's two moments in float32
GRADIENTS_ON_THEIR_WAY_BYTES = 4  # a parameter: DeepSpeed's buffer for the all-reduce
CHECKPOINT_BYTES = 12  # a parameter: weight and two moments
MODEL_BYTES = 4
LAYER_BYTES = 34  # a token and layer, in hidden sizes: Korthikanti et al. 2022, equation 1, without attention matrices
HEAD_BYTES = 10  # a prediction and token of the vocabulary: logits in half precision and float32, their gradient
CONTEXT_BYTES = 1.5e9  # CUDA's context, libraries' workspaces
USABLE_MEMORY = 0.95
LARGEST_MICRO_BATCH = 256  # beyond, speed gains nothing


@dataclass(frozen=True)
class Gpu:
    """What the maker says of a GPU."""

    tflops: float
    """Dense matrix products in half precision, summed in float32."""
    memory_gigabytes: float


GPUS = {  # NVIDIA's data sheets and white papers; H100, H200 and B200 as SXM modules, V100 with 32 GB
    "titan-v": Gpu(110, 12),
    "v100": Gpu(125, 32),
    "a100-40": Gpu(312, 40),
    "a100-80": Gpu(312, 80),
    "rtx-3090": Gpu(71, 24),
    "rtx-4090": Gpu(165, 24),
    "a6000": Gpu(155, 48),
    "l40s": Gpu(362, 48),
    "h100": Gpu(989, 80),
    "h200": Gpu(989, 141),
    "b200": Gpu(2250, 180),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: there is none; the message lists what there is.
    """
    if name.lower() not in GPUS:
        raise UserError(
            f"gpu '{name}' is not in the table: it has {', '.join(GPUS)}; leave --gpu out to time this machine"
        )
    return GPUS[name.lower()]


def memory_bytes(architecture: Architecture, sample: DataSample, micro_batch_size: int, num_gpus: int) -> float:
    """That one GPU should need: weights, gradients and moments, what a backward pass wants kept, and a fixed part."""
    held = HELD_BYTES + (GRADIENTS_ON_THEIR_WAY_BYTES if num_gpus > 1 else 0)
    tokens, predictions = (
        micro_batch_size * total / sample.workload.sequences
        for total in (sample.workload.tokens, sample.workload.predictions)
    )
    layers = LAYER_BYTES * architecture.hidden_size * architecture.num_hidden_layers * tokens
    head = HEAD_BYTES * architecture.padded_vocab_size * predictions
    return held * architecture.num_parameters + layers + head + CONTEXT_BYTES


def first_that_fits(
    gpu: Gpu, architecture: Architecture, sample: DataSample, micro_batch_sizes: list[int], num_gpus: int
) -> int:
    """The first of the sizes whose memory the GPU has.

    Raises:
        UserError: there is none.
    """
    needed = [memory_bytes(architecture, sample, size, num_gpus) for size in micro_batch_sizes]
    usable = USABLE_MEMORY * gpu.memory_gigabytes * 1e9
    for size, size_bytes in zip(micro_batch_sizes, needed, strict=True):
        if size_bytes <= usable:
            return size
    raise UserError(f"out of memory by the arithmetic: {needed[-1] / 1e9:.1f} GB of {gpu.memory_gigabytes} GB")


def computed_estimate(
    gpu: Gpu,
    utilisation: float,
    architecture: Architecture,
    sample: DataSample,
    batch_plan: BatchPlan,
    idle_share: float,
) -> Estimate:
    """What a run should take.

    Args:
        gpu: of which ``batch_plan.world_size`` train together.
        utilisation: share of the maker's rate that a step reaches.
        architecture: of the model.
        sample: of the data.
        batch_plan: the step's division.
        idle_share: of the step's positions, see :class:`pretrain.data_sample.Emptiness`.
    """
    num_gpus = batch_plan.world_size
    rate = num_gpus * utilisation * gpu.tflops * 1e12
    sequence_seconds = model_flops(architecture, sample.workload) / sample.workload.sequences / rate
    step = batch_plan.train_batch_size * sequence_seconds / (1 - idle_share)
    validation = sample.validation_rows * sequence_seconds * FORWARD_SHARE
    parameters = architecture.num_parameters
    checkpoint = CHECKPOINT_BYTES * parameters / DISK_BYTES_PER_SECOND
    export = EXPORT_SECONDS + MODEL_BYTES * parameters / DISK_BYTES_PER_SECOND
    durations = Durations(
        launch=LAUNCH_SECONDS,
        starting=STARTING_SECONDS,
        micro_batch_search=0.0,
        first_step=COMPILE_SECONDS + step,
        step=step,
        first_validation=validation,
        validation=validation,
        checkpoint=checkpoint,
        export=export,
        closing=checkpoint + validation + export,
    )
    return Estimate(
        durations,
        micro_batch_size=batch_plan.micro_batch_size,
        memory_bytes=memory_bytes(architecture, sample, batch_plan.micro_batch_size, num_gpus),
        checkpoint_bytes=CHECKPOINT_BYTES * parameters,
        model_bytes=MODEL_BYTES * parameters,
        log_line_bytes=LOG_LINE_BYTES,
    )
