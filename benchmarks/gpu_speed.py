"""Training steps of several sides, timed in turns: what the GPU benchmark says about speed."""

import statistics
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from benchmarks.gpu_rows import RowSource, to_batch
from benchmarks.gpu_sides import BARE_EAGER, Hardware, Side, Variant
from benchmarks.gpu_timing import Attempts, Clock, allocated_bytes, bytes_added_by, release_memory, say, seconds_of
from pretrain.architecture import Architecture, ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Batch
from pretrain.flops import matrix_product_rate, model_flops

RowKind = Literal["full", "packed", "padded"]  # rows without padding; rows of text, packed; the same, padded
_WORTH_DOUBLING = 1.02  # below this gain a larger micro-batch only costs memory


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    hardware: Hardware
    source: RowSource
    train_batch_size: int
    micro_batch_sizes: tuple[int, ...]
    rounds: int
    clock: Clock
    attempts: Attempts

    def architecture(self, config: ModelConfig) -> Architecture:
        """The model of that configuration on these rows."""
        return resolve(config, self.source.vocab_size, self.source.max_seq_length, pad_token_id=0)

    def batches(self, kind: RowKind, plan: BatchPlan, count: int) -> list[Batch]:
        """Fresh random batches of one shape, the same for every side."""
        source, generator = self.source, np.random.default_rng(0)
        make = source.full_rows if kind == "full" else source.realistic_rows
        shape = source.packed_shape(plan) if kind == "packed" else source.padded_shape(plan.micro_batch_size)
        rows = (make(plan.train_batch_size, generator) for _ in range(count))
        return [to_batch(part, shape, self.hardware.device) for part in rows]


@dataclass(frozen=True)
class Cell:
    """One side on one kind of rows."""

    variant: Variant
    rows: RowKind

    def __str__(self) -> str:
        return f"{self.variant.name}, {self.rows} rows"


@dataclass
class Steps:
    """What one cell's steps took."""

    batches: list[Batch]
    side: Side
    first_step_seconds: float
    """Compilation included, unless a cell before has compiled the same."""
    step_bytes: int
    """That a step holds besides weights, gradients and the optimizer's state."""
    seconds: list[float] = field(default_factory=list)


class InTurns:
    """Steps of several cells in turns, so that all of them see the same moods of the machine.

    Args:
        bench: what every measurement needs.
        size: the model's name in the record.
        config: the model.
        micro_batch_size: of all cells.
    """

    def __init__(self, bench: Bench, size: str, config: ModelConfig, micro_batch_size: int) -> None:
        self._bench = bench
        self._size = size
        self._architecture = bench.architecture(config)
        self._plan = BatchPlan(bench.train_batch_size, micro_batch_size, world_size=1)
        self._sides: dict[str, Side] = {}
        self._state_bytes: dict[str, int] = {}
        self._steps: dict[Cell, Steps] = {}
        self._peak_flops: list[float] = []

    def run(self, cells: list[Cell]) -> "InTurns":
        """Measure ``cells``, the most important first, as many as there is time for."""
        slowest = 0.0
        for cell in cells:
            if not self._bench.clock.has_room_for(slowest):
                self._bench.attempts.outcomes[self._name(cell)] = "no time left"
                continue
            steps = self._bench.attempts.of(self._name(cell), lambda: self._first_step(cell))  # noqa: B023
            if steps:
                self._steps[cell] = steps
                slowest = max(slowest, steps.first_step_seconds)
        for number in range(self._bench.rounds):
            round_seconds = sum(steps.seconds[-1] for steps in self._steps.values()) if number else 0.0
            if not self._bench.clock.has_room_for(round_seconds):
                break
            self._round(number)
        return self

    def _name(self, cell: Cell) -> str:
        return f"BERT-{self._size}, micro-batches of {self._plan.micro_batch_size}: {cell}"

    def _first_step(self, cell: Cell) -> Steps:
        """The first step, which compiles and makes the optimizer's state, and a second one, which shows its memory."""
        say(f"{self._name(cell)} ...")
        device, name = self._bench.hardware.device, cell.variant.name
        batches = self._bench.batches(cell.rows, self._plan, 1 + self._bench.rounds)
        before = allocated_bytes(device)
        is_new = name not in self._sides
        side = self._sides.get(name) or cell.variant.build(self._architecture, self._plan, self._bench.hardware)
        first = seconds_of(lambda: side.step(batches[0]), device)
        if is_new:
            self._sides[name], self._state_bytes[name] = side, allocated_bytes(device) - before
        return Steps(batches, side, first, bytes_added_by(lambda: side.step(batches[0]), device))

    def _round(self, number: int) -> None:
        device = self._bench.hardware.device
        self._peak_flops.append(matrix_product_rate(device, self._bench.hardware.dtype))
        for steps in self._steps.values():
            batch = steps.batches[1 + number]
            steps.seconds.append(seconds_of(lambda: steps.side.step(batch), device))  # noqa: B023

    def speed_up(self, cell: Cell, over: Cell) -> float | None:
        """How many times as fast the one is as the other: the median over rounds; None where one has not run."""
        if cell not in self._steps or over not in self._steps or not self._peak_flops:
            return None
        pairs = zip(self._steps[over].seconds, self._steps[cell].seconds, strict=True)
        return round(statistics.median(theirs / ours for theirs, ours in pairs), 3)

    def records(self) -> list[dict[str, Any]]:
        """Everything, with each round's figures."""
        return [self.record(cell) for cell, steps in self._steps.items() if steps.seconds]

    def record(self, cell: Cell) -> dict[str, Any]:
        """One cell's figures: medians, and the rounds that they are of."""
        steps = self._steps[cell]
        batches = steps.batches[1 : 1 + len(steps.seconds)]
        works = [batch.workload for batch in batches]
        utilisations = [
            model_flops(self._architecture, work) / seconds / peak
            for work, seconds, peak in zip(works, steps.seconds, self._peak_flops, strict=True)
        ]
        per_second = [
            (work.sequences / seconds, work.tokens / seconds)
            for work, seconds in zip(works, steps.seconds, strict=True)
        ]
        return {
            "model": self._size,
            "side": cell.variant.name,
            "rows": cell.rows,
            "micro_batch_size": self._plan.micro_batch_size,
            "micro_batches": [len(batch.micro_batches) for batch in batches],
            "sequences_per_second": round(statistics.median(sequences for sequences, _ in per_second), 1),
            "tokens_per_second": round(statistics.median(tokens for _, tokens in per_second)),
            "flop_utilisation": round(statistics.median(utilisations), 4),
            "first_step_seconds": round(steps.first_step_seconds, 2),
            "state_gigabytes": round(self._state_bytes[cell.variant.name] / 1e9, 2),
            "step_gigabytes": round(steps.step_bytes / 1e9, 2),
            "step_seconds": [round(seconds, 5) for seconds in steps.seconds],
            "peak_tflops": [round(peak / 1e12, 3) for peak in self._peak_flops],
        }

    def close(self) -> None:
        """Give the memory back."""
        self._steps.clear()
        self._sides.clear()
        release_memory(self._bench.hardware.device)


def fastest_micro_batch_size(bench: Bench, size: str, config: ModelConfig) -> tuple[int | None, list[dict[str, Any]]]:
    """Full rows at growing micro-batches with the plain operations, which start at once.

    Returns:
        the smallest size that is as good as the fastest, None where not even the smallest fits; and the records.
    """
    bench = replace(bench, train_batch_size=max(bench.micro_batch_sizes), rounds=min(3, bench.rounds))
    records = by_micro_batch_size(bench, size, config, Cell(BARE_EAGER, "full"))
    speeds = {record["micro_batch_size"]: record["sequences_per_second"] for record in records}
    good = [number for number, speed in speeds.items() if _WORTH_DOUBLING * speed >= max(speeds.values())]
    return min(good, default=None), records


def by_micro_batch_size(bench: Bench, size: str, config: ModelConfig, cell: Cell) -> list[dict[str, Any]]:
    """Records of one cell at growing micro-batches, as far as memory and time go."""
    records: list[dict[str, Any]] = []
    for micro_batch_size in bench.micro_batch_sizes:
        if records and not bench.clock.has_room_for(2 * records[-1]["first_step_seconds"]):
            break
        turns = InTurns(bench, size, config, micro_batch_size).run([cell])
        found = turns.records()
        turns.close()
        if not found:
            break
        records += found
    return records
