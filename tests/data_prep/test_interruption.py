"""A build that is killed, loses a worker or fills the disk goes on with the same command, to the same bytes."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.tokenizer import save_tokenizer, train_wordpiece

# What newly appears when a phase begins, and how long it goes on at least.
PHASES = {
    "tokenise": ("work/unit-*.npz", 0.15),
    "join": ("work/documents.npy", 0.03),
    "shards": ("work/*.h5.sha256", 0.25),
    "finish": ("manifest.json", 0.0),
}
FEWEST_KILLS, FEWEST_A_PHASE, MOST_ROUNDS = 20, 3, 15


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """A build of six units of text and twenty shards."""
    folder = tmp_path_factory.mktemp("killed")
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("abcdefghij"), 6)) for _ in range(2000)])
    documents = [" ".join(generator.choice(words, 60)) + "." for _ in range(40_000)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    tokenizer = train_wordpiece(lambda: documents[:2000], vocab_size=500)
    save_tokenizer(tokenizer, folder / "tokenizer", 128)
    config = {
        "sources": [{"kind": "text", "path": str(folder / "text.txt")}],
        "tokenizer": str(folder / "tokenizer"),
        "dupe_factor": 1,
        "rows_per_shard": 3000,
        "num_workers": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def expected(config_file, tmp_path_factory) -> dict[str, bytes]:
    """The files of a build that was left alone."""
    out = tmp_path_factory.mktemp("expected") / "data"
    finish(config_file, out)
    return contents(out)


def start(config_file: Path, out: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_prep", "build", "--config", str(config_file), "--output_dir", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes, **options)


def phase(out: Path) -> str:
    """How far a build has come, as its files tell."""
    work = out / "work"
    if (out / "manifest.json").exists():
        return "finish" if work.exists() else "done"
    if (work / "corpus.json").exists():
        return "shards"
    if (work / "documents.npy").exists():
        return "join"
    return "tokenise" if any(work.glob("unit-*.npz")) else "start"


def kill_in(wanted: str, config_file: Path, out: Path, draw: random.Random) -> str:
    """Go on with a build and kill all its processes at a random moment of a phase; returns the phase that was hit."""
    pattern, seconds = PHASES[wanted]
    before = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
    process = start(config_file, out)
    while process.poll() is None and not any(is_new(path, before) for path in out.glob(pattern)):
        time.sleep(0.0003)
    time.sleep(draw.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return phase(out)


def is_new(path: Path, before: dict[Path, int]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return before.get(path) != path.stat().st_mtime_ns
    return False


def finish(config_file: Path, out: Path) -> None:
    process = start(config_file, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def contents(out: Path) -> dict[str, bytes]:
    files = [*out.glob("*.h5"), out / "manifest.json", *(out / "tokenizer").iterdir()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.timeout(600)
def test_twenty_kills_in_all_phases_change_no_byte(config_file, expected, tmp_path) -> None:
    draw = random.Random(1)
    hits: Counter[str] = Counter()
    for number in range(MOST_ROUNDS):
        out = tmp_path / f"killed-{number}"
        for wanted in PHASES:
            for _ in range(draw.choice([1, 1, 2])):
                if phase(out) in ("start", *PHASES) and list(PHASES).index(wanted) >= position(phase(out)):
                    hit = kill_in(wanted, config_file, out, draw)
                    hits[hit] += hit in PHASES
                    print(f"build {number}: aimed at {wanted}, killed in {hit}")
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.h5") if noted(path)}
        finish(config_file, out)
        assert contents(out) == expected
        assert not (out / "work").exists()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept  # no finished shard was made again
        if hits.total() >= FEWEST_KILLS and all(hits[name] >= FEWEST_A_PHASE for name in PHASES):
            break
    print(f"kills by phase: {dict(hits)}")
    assert hits.total() >= FEWEST_KILLS
    assert all(hits[name] >= FEWEST_A_PHASE for name in PHASES)


def position(name: str) -> int:
    return ["start", *PHASES].index(name) - 1


def noted(shard: Path) -> bool:
    return (shard.parent / "work" / f"{shard.name}.sha256").exists()


def error_line(process: subprocess.Popen) -> str:
    """What a command that failed says to people."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kilobytes", [100, 1500, 3000])
def test_a_full_disk_ends_in_one_line_and_the_build_goes_on(kilobytes, config_file, expected, tmp_path) -> None:
    # The largest file allowed stands in for the disk: the tokenizer, units, token file or shards don't fit.
    limit = (kilobytes * 1000, kilobytes * 1000)
    process = start(config_file, tmp_path / "data", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert "run the same command again, which goes on from here" in error_line(process)
    assert not (tmp_path / "data" / "manifest.json").exists()
    finish(config_file, tmp_path / "data")
    assert contents(tmp_path / "data") == expected


def test_a_worker_that_dies_ends_in_one_line_and_the_build_goes_on(config_file, expected, tmp_path) -> None:
    out = tmp_path / "data"
    process = start(config_file, out)
    while process.poll() is None and phase(out) == "start":
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert "a worker process died" in error_line(process)
    finish(config_file, out)
    assert contents(out) == expected


def test_a_source_that_changed_is_refused_by_name(config_file, tmp_path) -> None:
    config = yaml.safe_load(config_file.read_text())
    text = tmp_path / "text.txt"
    text.write_bytes(Path(config["sources"][0]["path"]).read_bytes())
    changed_config = tmp_path / "config.yaml"
    changed_config.write_text(yaml.safe_dump({**config, "sources": [{"kind": "text", "path": str(text)}]}))
    for attempt in range(20):
        out = tmp_path / f"data-{attempt}"
        if kill_in("tokenise", changed_config, out, random.Random(attempt)) == "tokenise":
            break
    with text.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"xxxx")  # the same size and the same ends: only reading it all tells
    assert f"source {text} changed" in error_line(start(changed_config, out))
    text.write_text("another text")
    assert f"{text} has changed" in error_line(start(changed_config, out))
