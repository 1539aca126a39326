"""Data preparation against its limit: ratios of figures that are measured in one run, side by side.

    python benchmarks/data_prep.py [--data DIR] [--rounds 3] [--record]

The limit is what `tokenizers` needs to encode the text once, on one thread. The build does that and everything else:
read, clean, split into sentences, cut, mask ten copies, shuffle, write, checksum. Each runs in a process of its own,
pinned to as many cores as it has workers, parent included, in turns. DIR holds wikitext/enwiki-2014-train.txt.gz and
bert-base-uncased/vocab.txt; without them the demo's generated text stands in, and the figures say so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, whose data_prep.py is not the package

from benchmarks.shared import record, table, text_to_build
from data_prep.build import build
from data_prep.config import TRAIN_A_TOKENIZER, DataConfig
from data_prep.documents import Source, read_documents
from data_prep.shards import SplitReader, read_manifest
from data_prep.tokenizer import load_tokenizer, train_wordpiece

# MB/s on one core, all ten copies, measured once on English Wikipedia text on another machine: with the tokenizer that
# the scripts were written for, and with a present-day one. They tokenise again for every copy. On that machine
# `tokenizers` alone made 1.76 MB/s, so they are compared by what share of that they reach.
SCRIPTS_OF_24HBERT = {"as written": 0.026, "with a modern tokenizer": 0.07}
TOKENIZERS_BESIDE_THEM = 1.76
TARGETS = {
    "vs_tokenizers": ("at least", 0.75),
    "two_workers_vs_one": ("at least", 1.6),
    "vs_24hbert_modern": ("at least", 15),
    "bytes_per_row_on_disk": ("at most", 320),
    "bytes_per_row_in_memory": ("at most", 320),
    "rows_read_per_second": ("at least", 500_000),
    "parent_memory_8x_vs_1x": ("at most", 1.25),
    "worker_memory_8x_vs_1x": ("at most", 1.25),
}


def main() -> None:
    """Measure everything, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with wikitext/ and bert-base-uncased/")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the figures are medians")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/cpu/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](json.loads(sys.stdin.read()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.data, arguments.rounds, Path(folder))
    print(table(figures, TARGETS))
    if arguments.record:
        record(figures, "cpu", "data_prep")
    print(json.dumps(figures))


def measure(data: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    config, text_bytes, name = text_to_build(data, folder)
    tokenizers_seconds, one, two = [], [], []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr)
        tokenizers_seconds.append(run_child("tokenizers", {"config": asdict(config)}, cores=1)["seconds"])
        for workers, seconds in ((1, one), (2, two)):
            out = folder / f"{workers}-{number}"
            made = run_child(
                "build", {"config": asdict(replace(config, num_workers=workers)), "out": str(out)}, workers
            )
            seconds.append(made["seconds"])
    rates = {
        "tokenizers_mb_per_second": text_bytes / 1e6 / statistics.median(tokenizers_seconds),
        "one_worker_mb_per_second": text_bytes / 1e6 / statistics.median(one),
        "two_workers_mb_per_second": text_bytes / 1e6 / statistics.median(two),
    }
    single = rates["one_worker_mb_per_second"]
    share = single / rates["tokenizers_mb_per_second"]
    return {
        "text": name,
        "text_megabytes": round(text_bytes / 1e6, 1),
        "rounds": rounds,
        **{key: round(value, 3) for key, value in rates.items()},
        "vs_tokenizers": round(share, 3),
        "two_workers_vs_one": round(rates["two_workers_mb_per_second"] / single, 3),
        "vs_24hbert_modern": round(share * TOKENIZERS_BESIDE_THEM / SCRIPTS_OF_24HBERT["with a modern tokenizer"], 1),
        "vs_24hbert_as_written": round(share * TOKENIZERS_BESIDE_THEM / SCRIPTS_OF_24HBERT["as written"], 1),
        "padding_share": read_manifest(folder / "1-0").content["padding_share"],
        **run_child("read", {"folder": str(folder / "1-0")}, cores=1),
        **memory(config, folder),
    }


def run_child(name: str, task: dict[str, Any], cores: int) -> dict[str, Any]:
    """One measurement in a process of its own that may use the first ``cores`` cores."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    command = [sys.executable, __file__, "--child", name]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        input=json.dumps(task),
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    return json.loads(result.stdout.splitlines()[-1])


def config_of(task: dict[str, Any]) -> DataConfig:
    """The configuration that was sent as JSON."""
    fields = task["config"]
    return DataConfig(**{**fields, "sources": [Source(**source) for source in fields["sources"]]})


def child_tokenizers(task: dict[str, Any]) -> dict[str, float]:
    """`tokenizers` alone, over whole documents, which is its fastest way."""
    config = config_of(task)
    documents = list(read_documents(config.sources))
    if config.tokenizer == TRAIN_A_TOKENIZER:
        tokenizer = train_wordpiece(lambda: documents, config.vocab_size).backend_tokenizer
    else:
        tokenizer = load_tokenizer(config.tokenizer).backend_tokenizer
    start = time.perf_counter()
    for first in range(0, len(documents), 1000):
        tokenizer.encode_batch_fast(documents[first : first + 1000], add_special_tokens=False)
    return {"seconds": time.perf_counter() - start}


def child_build(task: dict[str, Any]) -> dict[str, float]:
    """The whole build, its worker processes' start included; what Python imports first is not, on either side."""
    config, out = config_of(task), Path(task["out"])
    if config.tokenizer != TRAIN_A_TOKENIZER:
        load_tokenizer(config.tokenizer)
    start = time.perf_counter()
    build(config, out)
    return {"seconds": time.perf_counter() - start}


def child_read(task: dict[str, Any]) -> dict[str, float]:
    """Reading as training does: in order, in batches, from warm files."""
    manifest = read_manifest(Path(task["folder"]))
    shard = manifest.of_split("train")[0]
    reader = SplitReader(manifest, "train")
    rates, batch = [], 4096
    for _ in range(4):  # the first one warms
        start = time.perf_counter()
        for first in range(0, reader.num_rows - batch, batch):
            rows = reader.read_range(first, first + batch)
        rates.append((reader.num_rows - batch) / (time.perf_counter() - start))
    reader.close()
    return {
        "rows_read_per_second": round(statistics.median(rates[1:])),
        "bytes_per_row_on_disk": round((manifest.folder / shard.file).stat().st_size / shard.rows, 1),
        "bytes_per_row_in_memory": sum(array.nbytes for array in vars(rows).values()) / batch,
    }


CHILDREN: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "tokenizers": child_tokenizers,
    "build": child_build,
    "read": child_read,
}


def memory(config: DataConfig, folder: Path) -> dict[str, float]:
    """Peak memory of the parent and of the largest worker, for the text once and eight times.

    Their own memory, and apart from it the pages of files that they have mapped, which the system may take back.
    """
    documents = list(read_documents(config.sources))
    figures: dict[str, float] = {}
    for times in (1, 8):
        text = folder / f"{times}x.txt"
        with text.open("w", encoding="utf-8") as file:
            for copy in range(times):  # the copies differ, as documents of a larger corpus do
                file.writelines(f"Part {copy}.\n{document}\n\n" for document in documents)
        tokenizer = str(folder / "1-0" / "tokenizer")
        task = replace(config, sources=[Source("text", str(text))], tokenizer=tokenizer)
        peaks = peak_memory({"config": asdict(task), "out": str(folder / f"memory-{times}")})
        figures |= {f"{name}_megabytes_{times}x": round(peak / 1e6) for name, peak in peaks.items()}
    for who in ("parent", "worker"):
        figures[f"{who}_memory_8x_vs_1x"] = round(figures[f"{who}_megabytes_8x"] / figures[f"{who}_megabytes_1x"], 2)
    return figures


def peak_memory(task: dict[str, Any]) -> dict[str, int]:
    """The highest figures of a build's parent and of any of its workers, in bytes."""
    peaks = {"parent": 0, "worker": 0, "worker_mapped": 0}
    command = [sys.executable, __file__, "--child", "build"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    feeder = threading.Thread(target=lambda: process.communicate(json.dumps(task)))
    feeder.start()
    while feeder.is_alive():
        peaks["parent"] = max(peaks["parent"], resident(process.pid, "RssAnon"))
        for worker in children_of(process.pid):
            peaks["worker"] = max(peaks["worker"], resident(worker, "RssAnon"))
            peaks["worker_mapped"] = max(peaks["worker_mapped"], resident(worker, "RssFile"))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"the build ended with exit code {process.returncode}")
    return peaks


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident(pid: int, kind: str) -> int:
    """A process's resident memory of a kind in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), 0)


if __name__ == "__main__":
    main()
