"""The batch arithmetic, derived once a run: sequences a step, micro-batches a step, slots a micro-batch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import UserError
from data_prep.shards import RowSizes

# Of the slots that rows of their own take. Above, taking sequences apart costs more than it saves.
_WORTH_PACKING = 0.97
_SAMPLED_STEPS = 64
_SAMPLED_ROWS = 2**18  # at least, where the data has them
_SLOTS_MULTIPLE = 16
_PREDICTIONS_MULTIPLE = 8


def check_divisible(train_batch_size: int, micro_batch_size: int | Literal["auto"], world_size: int) -> None:
    """Refuse a batch that can't be divided evenly.

    Raises:
        UserError: naming the numbers.
    """
    by, divisor = f"{world_size} processes", world_size
    if micro_batch_size != "auto":
        by, divisor = f"micro_batch_size {micro_batch_size} x {by}", micro_batch_size * world_size
    if train_batch_size % divisor:
        raise UserError(f"train_batch_size {train_batch_size} is not divisible by {by}: change one of them")


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided."""

    train_batch_size: int
    """Sequences a step over all ranks."""
    micro_batch_size: int
    """Sequences a forward and backward pass on one rank."""
    world_size: int

    def __post_init__(self) -> None:
        check_divisible(self.train_batch_size, self.micro_batch_size, self.world_size)

    @property
    def micro_batches(self) -> int:
        """A step over all ranks; one more where its sequences are unusually long."""
        return self.train_batch_size // self.micro_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step on one rank."""
        return self.micro_batches // self.world_size

    def __str__(self) -> str:
        return (
            f"{self.train_batch_size} sequences a step = {self.world_size} processes x "
            f"{self.gradient_accumulation_steps} micro-batches x {self.micro_batch_size} sequences"
        )


@dataclass(frozen=True)
class MicroBatchShape:
    """What every micro-batch of a run has room for, so that a compiled step is compiled once."""

    sequences: int
    max_seq_length: int
    slots: int
    """Token positions that are computed."""
    predictions: int

    @property
    def is_packed(self) -> bool:
        """Whether sequences lie end to end rather than in rows of their own."""
        return self.slots < self.sequences * self.max_seq_length

    def __str__(self) -> str:
        packed = f"packed into {self.slots} slots" if self.is_packed else f"padded to {self.max_seq_length}"
        return f"{self.sequences} sequences {packed}, room for {self.predictions} predictions"

    @property
    def room(self) -> int:
        """Tokens that fit: packed, the last slot stays free."""
        return self.slots - 1 if self.is_packed else self.slots


def deal(sequences: int, groups: int) -> np.ndarray:
    """The group of each of ``sequences``, which are sorted by length: dealt out back and forth, so that every group
    gets as many (give or take one) and nearly as many tokens."""
    lap, place = np.divmod(np.arange(sequences), groups)
    return np.where(lap % 2, groups - 1 - place, place)


def plan_shape(sizes: RowSizes, plan: BatchPlan, max_seq_length: int, max_predictions_per_seq: int) -> MicroBatchShape:
    """The slots with which steps are cheapest, from the sizes of a sample of rows.

    Fewer slots leave less of them empty; but when a step's sequences do not fit, one rank makes one more micro-batch
    and the others wait for it.
    """
    sequences = plan.micro_batch_size
    tokens, predictions = _fullest_micro_batches(sizes, plan)
    slots = _cheapest(tokens + 1, plan, _SLOTS_MULTIPLE, at_least=max_seq_length + 1)
    if slots > _WORTH_PACKING * sequences * max_seq_length:
        slots = sequences * max_seq_length
    room = _cheapest(predictions, plan, _PREDICTIONS_MULTIPLE, at_least=max_predictions_per_seq)
    return MicroBatchShape(sequences, max_seq_length, slots, min(room, sequences * max_predictions_per_seq))


def sample_size(plan: BatchPlan) -> int:
    """Rows that :func:`plan_shape` should see."""
    return max(_SAMPLED_STEPS * plan.train_batch_size, _SAMPLED_ROWS)


def _fullest_micro_batches(sizes: RowSizes, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and predictions of the fullest micro-batch of each sampled step, [steps] each."""
    steps = max(1, len(sizes.tokens) // plan.train_batch_size)
    shape = (steps, plan.train_batch_size)
    tokens, predictions = np.resize(sizes.tokens, shape), np.resize(sizes.predictions, shape)
    order = np.argsort(-tokens, axis=1, kind="stable")
    return tuple(_fullest(np.take_along_axis(values, order, axis=1), plan) for values in (tokens, predictions))


def _fullest(values: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """The largest sum that a micro-batch gets where the columns of ``values`` [steps, sequences] are dealt out."""
    laps = values.reshape(len(values), plan.micro_batch_size, plan.micro_batches).copy()
    laps[:, 1::2] = laps[:, 1::2, ::-1]  # as in :func:`deal`
    return laps.sum(axis=1).max(axis=1)


def _cheapest(needed: np.ndarray, plan: BatchPlan, multiple: int, at_least: int) -> int:
    """The room that costs least a step, of what sampled steps have needed: half of them at least should fit."""
    rooms, counts = np.unique(-(-np.maximum(needed, at_least) // multiple) * multiple, return_counts=True)
    too_small = 1.0 - counts.cumsum() / counts.sum()
    costs = rooms * (plan.gradient_accumulation_steps + too_small)
    return int(rooms[np.where(too_small <= 0.5, costs, np.inf).argmin()])
