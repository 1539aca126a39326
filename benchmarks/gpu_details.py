"""What the GPU benchmark finds inside a step: its longest kernels, the head's memory, waiting for data."""

import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_rows import with_dense_head
from benchmarks.gpu_sides import OURS, InBareLoop, new_model
from benchmarks.gpu_speed import Bench
from benchmarks.gpu_timing import bytes_added_by, say
from data_prep.shards import Manifest
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Batch, TrainingBatches, shape_of_micro_batches

_LONGEST = 10
_WARM_UP_STEPS = 2


def longest_kernels(bench: Bench, config: ModelConfig, micro_batch_size: int) -> list[dict[str, Any]]:
    """The ten kernels that take most of a packed training step, all launches of each together."""
    say("profile of a step ...")
    hardware = bench.hardware
    plan = BatchPlan(bench.train_batch_size, micro_batch_size, world_size=1)
    *warm_up, profiled = bench.batches("packed", plan, _WARM_UP_STEPS + 1)
    side = OURS.build(bench.architecture(config), plan, hardware)
    for batch in warm_up:
        side.step(batch)
    on_gpu = hardware.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        side.step(profiled)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    averages = profiler.key_averages()
    events = [event for event in averages if event.device_type == wanted and not event.is_user_annotation]
    microseconds = {event: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(microseconds.values())
    longest = sorted(events, key=microseconds.__getitem__, reverse=True)[:_LONGEST]
    return [
        {
            "kernel": event.key,
            "launches": event.count,
            "milliseconds": round(microseconds[event] / 1000, 3),
            "share": round(microseconds[event] / total, 4),
        }
        for event in longest
    ]


def memory_of_heads(bench: Bench, config: ModelConfig, micro_batch_size: int) -> dict[str, float]:
    """What a forward and a backward pass hold besides weights and gradients, in gigabytes, operations as written; the
    dense head predicts at every position.
    """
    hardware, figures = bench.hardware, {}
    plan = BatchPlan(micro_batch_size, micro_batch_size, world_size=1)
    (sparse,) = bench.batches("full", plan, 1)
    model = new_model(bench.architecture(config), "eager", hardware, micro_batch_size)
    loop = InBareLoop(model, hardware)
    for name, batch in (("sparse", sparse), ("dense", with_dense_head(sparse))):
        say(f"memory with a {name} head ...")
        figure = f"{name}_head_gigabytes"
        held = bench.attempts.of(figure, lambda: _bytes_held(loop, batch, hardware.device))  # noqa: B023
        if held is not None:
            figures[figure] = round(held / 1e9, 2)
    return figures


def _bytes_held(loop: InBareLoop, batch: Batch, device: torch.device) -> int:
    loop.accumulate(batch)  # from now on the gradients are there
    return bytes_added_by(lambda: loop.accumulate(batch), device)


def data_wait(bench: Bench, config: ModelConfig, micro_batch_size: int, manifest: Manifest) -> dict[str, float]:
    """Steps over a data folder, read and packed in the background as in a run: the share of time spent waiting."""
    say("waiting for data ...")
    device = bench.hardware.device
    plan = BatchPlan(bench.train_batch_size, micro_batch_size, world_size=1)
    architecture = resolve(config, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
    side = OURS.build(architecture, plan, bench.hardware)
    batches = TrainingBatches(manifest, plan, shape_of_micro_batches(manifest, plan), 0, device, 42, 0)
    for _ in range(_WARM_UP_STEPS):
        side.step(batches.next_batch())
    waited, started = batches.wait_seconds, time.perf_counter()
    for _ in range(bench.rounds):
        side.step(batches.next_batch())
    seconds = time.perf_counter() - started
    waited = batches.wait_seconds - waited
    batches.close()
    return {
        "data_wait_share": round(waited / seconds, 5),
        "data_folder_sequences_per_second": round(bench.rounds * plan.train_batch_size / seconds, 1),
    }
