"""The training step on a CPU against Hugging Face's, side by side: ratios of figures that are measured in one run.

    python benchmarks/pretrain_step.py [--data DIR] [--rounds 3] [--threads 2] [--record]

On one side BertForMaskedLM as the `run_mlm` script trains it: dense head, rows padded to 128, masks drawn by the
collator. On the other this project's step as a run makes it: packed micro-batches from the background thread, sparse
head, DeepSpeed's engine. Both take the same rows, BERT's own layout and dropout, the same fused AdamW, the same global
batch in the same micro-batches, in turns. DIR holds wikitext/enwiki-2014-train.txt.gz and bert-base-uncased/vocab.txt;
without them the demo's generated text stands in, and the figures say so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import torch
from transformers import AutoTokenizer, BertForMaskedLM, DataCollatorForLanguageModeling

from benchmarks.gpu_rows import with_all_positions
from benchmarks.shared import record, table, text_to_build
from data_prep.build import build
from data_prep.shards import Manifest, Rows, SplitReader, read_manifest
from pretrain.architecture import Architecture, ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches
from pretrain.ds_config import load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.flops import matrix_product_rate, model_flops
from pretrain.hugging_face import hugging_face_config
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.packing import pack
from pretrain.processes import start_processes, stop_processes

SIZES = {"mini": ("bert-mini", 128, 32), "base": ("bert-base", 32, 8)}  # preset, sequences a step, a micro-batch
MEMORY_BATCH = 32
PADDING_OF = [(4096, 128), (4096, 32), (512, 128), (512, 64), (512, 32), (64, 32)]  # sequences a step, a micro-batch
TARGETS = {
    "vs_hf_base": ("at least", 1.25),
    "vs_hf_mini": ("at least", 3.5),
    **{f"padding_share_{batch}x{micro}": ("at most", 0.03) for batch, micro in PADDING_OF if batch >= 512},
}
CPU = torch.device("cpu")


def main() -> None:
    """Measure everything, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with wikitext/ and bert-base-uncased/")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the figures are medians")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of either side")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(memory_of_a_pass(**json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.data, arguments.rounds, arguments.threads, Path(folder))
    print(table(figures, TARGETS))
    if arguments.record:
        record(figures, "cpu", "pretrain_step")
    print(json.dumps(figures))


def measure(data: Path, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    config, _, text = text_to_build(data, folder)
    build(replace(config, dupe_factor=2), folder / "data")
    manifest = read_manifest(folder / "data")
    processes = start_processes()
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {"text": text, "rounds": rounds, "threads": threads}
    for size in SIZES:
        figures |= speeds_of(size, manifest, rounds, processes)
    stop_processes()
    for train_batch_size, micro_batch_size in PADDING_OF:
        share = padding_share(manifest, BatchPlan(train_batch_size, micro_batch_size, world_size=1))
        figures[f"padding_share_{train_batch_size}x{micro_batch_size}"] = share
    figures["padding_share_padded"] = round(manifest.content["padding_share"], 4)
    return figures | memory(folder / "data", threads)


def speeds_of(size: str, manifest: Manifest, rounds: int, processes: Any) -> dict[str, Any]:
    """Sequences a second of both sides, and what share of the matrix products' speed ours are."""
    preset, train_batch_size, micro_batch_size = SIZES[size]
    architecture = architecture_of(preset, manifest)
    plan = BatchPlan(train_batch_size, micro_batch_size, world_size=1)
    theirs, ours = HuggingFaceSide(architecture, manifest, plan), OurSide(architecture, manifest, plan, processes)
    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    utilisations = []
    for number in range(1 + rounds):  # the first one warms
        print(f"BERT-{size}: round {number} of {rounds} ...", file=sys.stderr)
        first = number * train_batch_size
        pair = {"hf": seconds_of(lambda: theirs.step(first)), "ours": seconds_of(ours.step)}  # noqa: B023
        if number:
            for name, value in pair.items():
                seconds[name].append(value)
            peak = matrix_product_rate(CPU, torch.float32)
            utilisations.append(model_flops(architecture, ours.workload) / pair["ours"] / peak)
    ours.close()
    ratio = statistics.median(hf / our for hf, our in zip(seconds["hf"], seconds["ours"], strict=True))
    return {
        f"batch_{size}": f"{train_batch_size} in {plan.gradient_accumulation_steps} micro-batches",
        f"hf_{size}_sequences_per_second": round(train_batch_size / statistics.median(seconds["hf"]), 2),
        f"ours_{size}_sequences_per_second": round(train_batch_size / statistics.median(seconds["ours"]), 2),
        f"vs_hf_{size}": round(ratio, 3),
        f"flop_utilisation_{size}": round(statistics.median(utilisations), 3),
    }


def architecture_of(preset: str, manifest: Manifest) -> Architecture:
    """BERT's own layout, as Hugging Face's class has it."""
    config = ModelConfig(preset=preset, layer_norm="post_ln")
    return resolve(config, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)


def seconds_of(work: Any) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class HuggingFaceSide:
    """A plain loop over what `run_mlm` trains with; its Trainer would only add to it."""

    def __init__(self, architecture: Architecture, manifest: Manifest, plan: BatchPlan) -> None:
        self._plan = plan
        self._reader = SplitReader(manifest, "train")
        tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer_folder)
        self._length = manifest.max_seq_length
        self._collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        self._model = BertForMaskedLM(hugging_face_config(architecture)).train()
        self._optimizer = build_optimizer(self._model, OptimizerConfig(learning_rate=1e-4))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"]

    def step(self, first: int) -> None:
        """One optimizer step over the rows from ``first`` on."""
        for start in range(first, first + self._plan.train_batch_size, self._plan.micro_batch_size):
            batch = self._collate(self._examples(start, start + self._plan.micro_batch_size))
            loss = self._model(**batch).loss / self._plan.gradient_accumulation_steps
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _examples(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows as a tokenised data set has them: without masks, padded to the full length."""
        rows = self._reader.read_range(start, stop)
        ids = unmasked(rows)
        inside = torch.arange(self._length) < torch.from_numpy(rows.sizes.tokens)[:, None]
        return [{"input_ids": row, "attention_mask": mask.long()} for row, mask in zip(ids, inside, strict=True)]


def unmasked(rows: Rows) -> torch.Tensor:
    """The rows' original tokens, int64 [rows, length]."""
    ids = rows.input_ids.astype("int64")
    row, slot = rows.masked_lm_positions.nonzero()
    ids[row, rows.masked_lm_positions[row, slot]] = rows.masked_lm_ids[row, slot]
    return torch.from_numpy(ids)


class OurSide:
    """The step as a pretraining run makes it."""

    def __init__(self, architecture: Architecture, manifest: Manifest, plan: BatchPlan, processes: Any) -> None:
        torch.manual_seed(0)
        model = MaskedLanguageModel(architecture)
        optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-4))
        self._engine = PretrainEngine(model, optimizer, load_ds_config("auto"), plan, 0.0, processes)
        self._batches = TrainingBatches(manifest, plan, shape_of_micro_batches(manifest, plan), 0, CPU, 42, 0)

    def step(self) -> None:
        """One optimizer step over the next rows."""
        batch = self._batches.next_batch()
        self.workload = batch.workload
        self._engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, 0)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


def padding_share(manifest: Manifest, plan: BatchPlan) -> float:
    """Share of the computed positions of an epoch that hold no token."""
    shape = shape_of_micro_batches(manifest, plan)
    reader = SplitReader(manifest, "train")
    computed = real = 0
    for first in range(0, reader.num_rows - plan.train_batch_size, plan.train_batch_size):
        rows = reader.read_range(first, first + plan.train_batch_size)
        computed += shape.slots * sum(1 for _ in pack(rows, shape))
        real += int(rows.sizes.tokens.sum())
    reader.close()
    return round(1 - real / computed, 4)


def memory(data: Path, threads: int) -> dict[str, float]:
    """What a pass over 32 sequences adds to a process's memory at BERT-base, each in a process of its own."""
    figures = {}
    for head in ("sparse", "dense"):
        task = json.dumps({"head": head, "data": str(data)})
        command = [sys.executable, __file__, "--child", task]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        figures[f"{head}_head_megabytes"] = json.loads(done.stdout.splitlines()[-1])
    return figures


def memory_of_a_pass(head: str, data: str) -> int:
    """Megabytes; the dense head predicts at every position, as Hugging Face's does."""
    manifest = read_manifest(Path(data))
    shape = shape_of_micro_batches(manifest, BatchPlan(MEMORY_BATCH, MEMORY_BATCH, world_size=1))
    model = MaskedLanguageModel(architecture_of("bert-base", manifest))
    micro_batch = next(pack(SplitReader(manifest, "train").read_range(0, MEMORY_BATCH), shape))
    if head == "dense":
        micro_batch = with_all_positions(micro_batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model(*micro_batch.model_inputs(CPU)).backward()
    return round((resident("VmHWM") - before) / 1e6)


def resident(kind: str) -> int:
    """This process's memory in bytes, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


if __name__ == "__main__":
    main()
