"""What the training rows of a data folder hold, told from a sample: lengths, and what packing leaves empty."""

from dataclasses import dataclass

from data_prep.shards import Manifest, SplitReader
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Workload, shape_of_micro_batches
from pretrain.packing import pack

_SAMPLED_ROWS = 2**16
_PACKED_ROWS = 2**14  # and one step at least


@dataclass(frozen=True)
class DataSample:
    """A data folder in numbers."""

    train_rows: int
    """Of all masked copies."""
    validation_rows: int
    dupe_factor: int | None
    """Masked copies of the text among the rows; None where the manifest does not tell."""
    workload: Workload
    """Of the sampled rows; the rows are shuffled, so the first ones are as good as any."""

    @property
    def tokens_per_sequence(self) -> float:
        """Real ones, [CLS] and [SEP] counted."""
        return self.workload.tokens / self.workload.sequences


@dataclass(frozen=True)
class Emptiness:
    """Shares of the computed positions."""

    padding: float
    """That hold no token."""
    idle: float
    """That hold no token, or that pass while a rank with one micro-batch less waits for the others."""


def sample_data(manifest: Manifest) -> DataSample:
    """Read the sizes of the first rows.

    Raises:
        UserError: a shard is missing or damaged, or a split has no rows.
    """
    validation, train = (SplitReader(manifest, split) for split in ("validation", "train"))
    sizes = train.read_sizes(0, 0, min(_SAMPLED_ROWS, train.shard_rows[0]))
    sample = DataSample(train.num_rows, validation.num_rows, manifest.content.get("dupe_factor"), Workload.of(sizes))
    for reader in (train, validation):
        reader.close()
    return sample


def emptiness(manifest: Manifest, plan: BatchPlan) -> Emptiness:
    """What a run's steps will leave empty, from packing some as the run packs them."""
    shape = shape_of_micro_batches(manifest, plan)
    reader = SplitReader(manifest, "train")
    computed = waited = real = 0
    for first in range(0, max(1, _PACKED_ROWS - plan.train_batch_size), plan.train_batch_size):
        rows = reader.read_range(*(min(first + part, reader.num_rows) for part in (0, plan.train_batch_size)))
        if len(rows) < plan.train_batch_size and real:
            break
        micro_batches = sum(1 for _ in pack(rows, shape))
        computed += shape.slots * micro_batches
        waited += shape.slots * plan.world_size * -(-micro_batches // plan.world_size)
        real += int(rows.sizes.tokens.sum())
    reader.close()
    return Emptiness(1 - real / computed, 1 - real / waited)
