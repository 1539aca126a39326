"""Everything that only a GPU can show, in one program: is the step right, how fast is it, what is it made of.

    python benchmarks/gpu.py [--minutes 30] [--sections large profile] [--data DIR] [--record]

One GPU, sequences of 128 tokens, in the precision that a run would take there. Sides that are compared have their steps
timed in turns, in one process; figures are medians, and the JSON has every repeat. Rows are random: full ones, and ones
as long as DIR's (a folder of `python -m data_prep build`; without it as long as English Wikipedia's). Hugging Face's
side is BertForMaskedLM as a user has it: dense head, rows padded to 128, scaled_dot_product_attention, compiled, with
the same precision and optimizer. What there is no time for is left out; the most important comes first.
`--self-check` does all of it on a CPU in a minute, tiny and uncompiled: it proves the program and no speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

import torch

from benchmarks.gpu_rows import RowSource
from benchmarks.gpu_sections import FULL_SCALE, SECTIONS, SELF_CHECK, GpuBenchmark, Scale
from benchmarks.gpu_sides import Hardware
from benchmarks.gpu_speed import Bench
from benchmarks.gpu_timing import Attempts, Clock
from benchmarks.shared import Targets, record, table
from data_prep.shards import read_manifest
from pretrain.ds_config import DS_CONFIGS
from pretrain.flops import matrix_product_rate
from pretrain.processes import start_processes, stop_processes

SELF_CHECKED = "CPU (self-check, no measurement)"
ANYWHERE: Targets = {"checks_failed": ("at most", 0)}
ON_A_GPU: Targets = {
    "flop_utilisation_large": ("at least", 0.45),
    "vs_hf_compiled_large": ("at least", 1.5),
    "deepspeed_vs_bare_large": ("at least", 0.97),
}
ON_AN_H200: Targets = {"sequences_per_second_large": ("at least", 1480)}


def main() -> None:
    """Measure what there is time for, print tables, and one line of JSON; exit code 1 where something went wrong."""
    arguments = parse_arguments()
    if torch.cuda.is_available() == arguments.self_check:
        sys.exit("--self-check is for a CPU" if arguments.self_check else "there is no GPU; on a CPU try --self-check")
    environment = dict(os.environ)  # of the run's processes: this one becomes a rank of its own
    with tempfile.TemporaryDirectory() as folder:
        # A first step is timed with its compilation, whatever this machine has compiled before.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        figures = measure(arguments, Path(folder), environment)
    print_tables(figures)
    if arguments.record:
        record(figures, re.sub(r"\W+", "-", figures["device"].lower()), "gpu")
    print(json.dumps(figures))
    sys.exit(1 if figures["checks_failed"] or figures["failures"] else 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="time for everything")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--data", type=Path, help="a folder of `python -m data_prep build`, sequences of 128")
    parser.add_argument("--glue", type=Path, help="folder with CoLA/ and RTE/; default: the demo's synthetic tasks")
    parser.add_argument("--glue-model", type=Path, help="what is fine-tuned; default: the model of the section 'run'")
    parser.add_argument("--self-check", action="store_true", help="everything tiny, on a CPU")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/<device>/")
    arguments = parser.parse_args()
    if arguments.self_check and arguments.record:
        parser.error("a self-check measures nothing to record")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """All figures."""
    clock = Clock(arguments.minutes)
    processes = start_processes()
    scale = SELF_CHECK if arguments.self_check else FULL_SCALE
    hardware = Hardware(processes, str(DS_CONFIGS / "bf16.json") if arguments.self_check else "auto")
    bench = Bench(
        hardware=hardware,
        source=row_source(scale, arguments.data),
        train_batch_size=scale.train_batch_size,
        micro_batch_sizes=scale.micro_batch_sizes,
        rounds=scale.rounds,
        clock=clock,
        attempts=Attempts(),
    )
    if arguments.self_check:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")
    benchmark = GpuBenchmark(scale, bench, arguments.data, folder, environment, arguments.glue, arguments.glue_model)
    with torch._dynamo.config.patch(recompile_limit=64):  # several sides share the code of one model
        figures = description(hardware) | benchmark.run(arguments.sections)
    stop_processes()
    return figures


def row_source(scale: Scale, data: Path | None) -> RowSource:
    """Rows as long as the data folder's, or as they usually are."""
    manifest = read_manifest(data) if data else None
    if manifest and manifest.max_seq_length != scale.max_seq_length:
        sys.exit(f"{data} has sequences of {manifest.max_seq_length} tokens: give one of {scale.max_seq_length}")
    return RowSource(scale.vocab_size, scale.max_seq_length, scale.max_predictions_per_seq, manifest)


def description(hardware: Hardware) -> dict[str, Any]:
    """What it is measured on."""
    device = hardware.device
    common = {
        "precision": str(hardware.dtype).removeprefix("torch."),
        "matrix_product_tflops": round(matrix_product_rate(device, hardware.dtype) / 1e12, 2),
    }
    if device.type != "cuda":
        return {"device": SELF_CHECKED, **common}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_gigabytes": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        **common,
    }


def driver_version() -> str:
    """NVIDIA's driver, as its own tool tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def print_tables(figures: dict[str, Any]) -> None:
    """For people."""
    single = {name: value for name, value in figures.items() if isinstance(value, str | int | float)}
    print(table(single, targets_on(figures["device"])))
    for check in figures["checks"]:
        print(f"{'yes' if check['agrees'] else 'NO ':<4}{check['check']}")
    print(rows_of_table(figures["speeds"], without=("micro_batches", "step_seconds", "peak_tflops")))
    print(rows_of_table(figures.get("longest_kernels", [])))
    for what, why in figures["no_result"].items():
        print(f"no result: {what}: {why}")


def targets_on(device: str) -> Targets:
    """What can be asked of it."""
    if device == SELF_CHECKED:
        return ANYWHERE
    return ANYWHERE | ON_A_GPU | (ON_AN_H200 if "H200" in device else {})


def rows_of_table(records: list[dict[str, Any]], without: tuple[str, ...] = ()) -> str:
    """Records as lines under their names."""
    if not records:
        return ""
    names = [name for name in records[0] if name not in without]
    cells = [names, *([f"{entry[name]}"[:60] for name in names] for entry in records)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    main()
