"""The whole held-out set, once per example over all ranks, with the same figures whatever their number.

The rows are cut into chunks that do not depend on the number of ranks; these take them in turn, and the chunks' sums
are added up in the chunks' order.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from data_prep.shards import Manifest, SplitReader
from pretrain.batch_plan import BatchPlan
from pretrain.batches import shape_of_micro_batches
from pretrain.engine import PretrainEngine
from pretrain.packing import pack

_MICRO_BATCHES_A_CHUNK = 16


@dataclass(frozen=True)
class ValidationFigures:
    """Means over all predictions of the held-out set."""

    loss: float
    """Cross-entropy in nats."""
    accuracy: float
    """Share of the predictions that are right."""

    @property
    def perplexity(self) -> float:
        """Of the masked tokens; no more than a float can hold."""
        return math.exp(min(self.loss, 700.0))

    def as_metrics(self) -> dict[str, float]:
        """As a line of the run's record."""
        return {"loss": self.loss, "accuracy": round(self.accuracy, 6), "perplexity": round(self.perplexity, 4)}

    def as_summary(self) -> dict[str, float]:
        """As the run's summary names them."""
        return {"validation_loss": self.loss, "validation_accuracy": round(self.accuracy, 6)}

    def __str__(self) -> str:
        return f"validation loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, accuracy {self.accuracy:.2%}"


class Validation:
    """Validates the engine's model.

    Args:
        manifest: the data folder.
        plan: how a global batch is divided.
        engine: of the model.
    """

    def __init__(self, manifest: Manifest, plan: BatchPlan, engine: PretrainEngine) -> None:
        self._manifest = manifest
        self._shape = shape_of_micro_batches(manifest, BatchPlan(plan.train_batch_size, plan.micro_batch_size, 1))
        self._engine = engine
        reader = SplitReader(manifest, "validation")
        self.rows: int = reader.num_rows
        """In the held-out set."""
        reader.close()

    def run(self, go_on: Callable[[], bool]) -> ValidationFigures | None:
        """The figures, None where it was given up; every rank calls it.

        Args:
            go_on: asked between chunks, the same answer on all ranks; False gives up.
        """
        processes = self._engine.processes
        chunk = _MICRO_BATCHES_A_CHUNK * self._shape.sequences
        starts = range(0, self.rows, chunk)
        sums = [[0.0] * len(starts) for _ in range(3)]  # loss, right predictions, predictions
        with closing(SplitReader(self._manifest, "validation")) as reader:
            for first in range(0, len(starts), processes.world_size):
                if not go_on():
                    return None
                own = first + processes.rank
                if own >= len(starts):
                    continue
                rows = reader.read_range(starts[own], min(starts[own] + chunk, self.rows))
                loss_sum, correct = self._engine.evaluate(pack(rows, self._shape))
                for total, value in zip(sums, (loss_sum, correct, float(rows.sizes.predictions.sum())), strict=True):
                    total[own] = value
        # Each chunk's sums come from one rank: adding the others' zeros changes no digit.
        loss_sum, correct, predictions = (sum(processes.sum(*by_chunk)) for by_chunk in sums)
        return ValidationFigures(loss_sum / max(1.0, predictions), correct / max(1.0, predictions))
