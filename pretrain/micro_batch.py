"""``micro_batch_size: auto``: the fastest size that fits, found by trying."""

import time

import torch

from data_prep.shards import Manifest, SplitReader
from pretrain.batches import model_inputs
from pretrain.model import MaskedLanguageModel

_SMALLEST = 8
_PASSES = 4
_WORTH_DOUBLING = 1.02  # below this gain in sequences a second, a larger size only costs memory


def find_micro_batch_size(
    model: MaskedLanguageModel,
    manifest: Manifest,
    rank_batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> dict[int, float]:
    """Time a forward and backward pass on real rows at growing sizes that divide ``rank_batch_size``.

    Stops where memory ends or a larger size no longer pays.

    Returns:
        Sequences a second by size, in the order tried; the last one that paid is the fastest.
    """
    sizes = [size for size in _powers_of_two(rank_batch_size) if rank_batch_size % size == 0] or [rank_batch_size]
    reader = SplitReader(manifest, "train")
    adams_memory = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
    speeds: dict[int, float] = {}
    for size in sizes:
        rows = reader.read_range(0, min(size, reader.num_rows))
        try:
            seconds = _time_pass(model, model_inputs(rows, size, device), autocast_dtype)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        previous = max(speeds.values(), default=0.0)
        speeds[size] = size / seconds
        if speeds[size] < _WORTH_DOUBLING * previous:
            break
    reader.close()
    del adams_memory
    return speeds


def _powers_of_two(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length()) if min(_SMALLEST, limit) <= 2**exponent <= limit]


def _time_pass(
    model: MaskedLanguageModel, inputs: tuple[torch.Tensor, ...], autocast_dtype: torch.dtype | None
) -> float:
    """Seconds of one pass: the fastest, since whatever else the machine does only ever adds time."""
    device = inputs[0].device
    passes = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            loss = model(*inputs)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        passes.append(time.perf_counter() - started)
    return min(passes)
