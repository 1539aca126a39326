"""What M-FAC costs at BERT-tiny's size: memory and seconds a step, beside AdamW's.

    python benchmarks/mfac.py [--num-grads 1024] [--steps 50] [--dtypes fp32 bf16] [--threads 2] [--record]

Each optimizer trains in a process of its own, from random weights, on random tokens in batches of 32 x 128: BERT-tiny
(Turc et al. 2019: 2 layers of 128, 2 heads, vocabulary 30,522) with a classifier's head. Whatever the weights are, time
and memory are the same. The window is filled with noise first, because only a full one costs what it costs in a long
run. Seconds are medians: of whole steps, and of the optimizer's part. Memory is the process's peak, and what it holds
more than AdamW's process does. num_grads 1024 wants 19 GB in fp32, 10 in bf16.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.shared import markdown, record
from common.errors import UserError
from finetune.optimizers import Optimizer, check_memory
from finetune.trial import parameter_groups

BATCH_SIZE, LENGTH, LEARNING_RATE = 32, 128, 1e-4
WARMING_STEPS = 2
GB = 1e9


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50, help="measured, after two that warm")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/<device>/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_in_process(Optimizer(**json.loads(arguments.child)), arguments)))
        return
    optimizers = [{}] + [
        {"name": "mfac", "num_grads": arguments.num_grads, "gradient_dtype": dtype} for dtype in arguments.dtypes
    ]
    figures: dict[str, Any] = {
        "num_grads": arguments.num_grads,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "device": arguments.device,
        "optimizers": {Optimizer(**each).title: run_process(each, arguments) for each in optimizers},
    }
    print(table(figures["optimizers"]))
    if arguments.record:
        record(figures, arguments.device.split(":")[0], "mfac")
    print(json.dumps(figures))


def run_process(optimizer: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """What a process of its own has measured."""
    print(f"{Optimizer(**optimizer).title} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--child", json.dumps(optimizer), "--device", arguments.device]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def measure_in_process(optimizer: Optimizer, arguments: argparse.Namespace) -> dict[str, float]:
    """Train and tell."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    classifier = BertForSequenceClassification(config).to(device)
    num_parameters = classifier.num_parameters()
    try:
        check_memory(optimizer, num_parameters, device, num_at_a_time=1)
    except UserError as error:
        sys.exit(f"error: {error}")
    built = optimizer.build(parameter_groups(classifier, weight_decay=0.0), LEARNING_RATE)
    steps, updates = [], []
    for number in range(WARMING_STEPS + arguments.steps):
        started = now(device)
        ids = torch.randint(config.vocab_size, (BATCH_SIZE, LENGTH), device=device)
        labels = torch.randint(2, (BATCH_SIZE,), device=device)
        functional.cross_entropy(classifier(input_ids=ids).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        before = now(device)
        built.step()
        updates.append(now(device) - before)
        built.zero_grad()
        steps.append(now(device) - started)
        if number == 0 and optimizer.name == "mfac":
            fill(built.state["window"])
    seconds = {
        "step_seconds": statistics.median(steps[WARMING_STEPS:]),
        "optimizer_seconds": statistics.median(updates[WARMING_STEPS:]),
    }
    return {"parameters": num_parameters, **seconds, "state_gb": optimizer.state_bytes(num_parameters) / GB} | {
        "peak_gb": peak_bytes(device) / GB
    }


def fill(window: dict[str, Any]) -> None:
    """As if it had been full for long, with gradients that have nothing in common."""
    num_blocks, num_grads, num_columns = window["gradients"].shape
    window["gradients"].copy_(torch.randn(num_grads, num_columns))
    window["units"].fill_((num_blocks * num_columns) ** -0.5)
    window["gram"].copy_(torch.eye(num_grads))
    window["num_seen"] = num_grads


def now(device: torch.device) -> float:
    """Seconds, when all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """The GPU's memory, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(figures: dict[str, dict[str, float]]) -> str:
    """One line an optimizer."""
    rows = [["", "s a step", "of it the optimizer", "state, GB", "peak, GB"]]
    for title, it in figures.items():
        seconds = [f"{it['step_seconds']:.3f}", f"{it['optimizer_seconds']:.3f}"]
        rows.append([title, *seconds, f"{it['state_gb']:.2f}", f"{it['peak_gb']:.2f}"])
    return markdown(rows)


if __name__ == "__main__":
    main()
