"""A search as a command of its own whose processes a test kills, and an independent reading of what its runs did."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import load_file

from common.cli import config_parser, parse, take_config
from common.process_tree import is_alive, parent
from pretrain.search_config import SearchConfig
from pretrain.search_runs import SearchRun
from pretrain.study import SearchStore

REPOSITORY = Path(__file__).parents[2]
STEPS, CHECKPOINT_STEPS, PAUSE_STEP = 120, 12, 60
CONFIG = {
    "pretrain": {
        "model": {"preset": "bert-tiny", "hidden_size": 256},
        "time_budget": None,
        "max_steps": STEPS,
        "train_batch_size": 24,
        "micro_batch_size": 12,
        "validation_interval": "10%",
        "early_validation_interval": None,
        "checkpoint_interval": "10%",
        "log_interval": 1,
    },
    "space": {"optimizer.learning_rate": [1.0e-9, 1.0e-3, 3.0e-3], "warmup_proportion": [0.0, 0.1]},
    "rungs": [{"at": "20%", "keep": "below 6.5"}, {"at": "50%", "keep": "top 50 %"}],
    "gpus_per_run": 1,
}

FOUND = ("parameters", "state", "stretch", "because", "steps", "sequences", "curve", "rung_losses", "final_loss")


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What the condition gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return found


class SearchCommand:
    """``python -m pretrain search`` in a process of its own, without GPUs.

    Args:
        folder: of the search; configuration and log are put beside it.
        data_dir: of its runs.
        config: as the YAML file has it.
        wrapper: a command to start it by.
    """

    def __init__(self, folder: Path, data_dir: Path, config: dict[str, Any], wrapper: Sequence[str] = ()) -> None:
        self.folder, self._wrapper = folder, wrapper
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._log = folder.with_suffix(".log")
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        self._arguments = ["--config", file, "--data_dir", data_dir, "--output_dir", folder]
        self._config = take_config(parse(config_parser("", "", SearchConfig), ["--config", str(file)]), SearchConfig)
        self._url = config.get("storage") or f"sqlite:///{folder / 'trials.db'}"
        self._store: SearchStore | None = None
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [*self._wrapper, sys.executable, "-m", "pretrain", "search", *map(str, self._arguments)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, seconds: float) -> None:
        """Wait for its end, which is a good one."""
        assert self.process.wait(seconds) == 0, self.log()
        assert self.members() == []

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def runs(self) -> list[SearchRun]:
        """As its storage has them; none before it has one."""
        if self._store is None and (self.folder / "runs").exists():
            store = SearchStore(self._url, self._config)
            self._store = store if store.reopen() else None
        return self._store.runs() if self._store else []

    def members(self) -> list[tuple[str, str, int]]:
        """(run, kind, process) of all processes of its runs that live."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or ())
            run = re.search(rf"{self.folder}/runs/(\d+)/", line)
            if run and process.info["status"] != psutil.STATUS_ZOMBIE:
                kinds = {"launcher.runner": "runner", "launcher.launch": "launcher"}
                kind = next((kind for module, kind in kinds.items() if module in line), "rank")
                found.append((run[1], kind, process.pid))
        return found

    def run_folders(self) -> list[Path]:
        return sorted(self.folder.glob("runs/*/run"))

    def phases(self) -> dict[str, tuple[str, int]]:
        """By run, what its rank does that lives and has come so far as to say it, and that process."""
        found = {}
        for folder in self.run_folders():
            with suppress(OSError, json.JSONDecodeError):
                status = json.loads((folder / "status.json").read_text())
                if is_alive(status["pid"]):
                    pauses = status["step"] == PAUSE_STEP and status["phase"] in ("validation", "saving")
                    found[folder.parent.name] = "pausing" if pauses else status["phase"], status["pid"]
        return found


def family(rank: int) -> dict[str, int]:
    """The processes of a run by their kind, as far as they live; quick, too."""
    found = {"rank": rank, "runner": os.getsid(rank)}
    launcher = parent(rank)
    if launcher and launcher != os.getsid(rank) and os.getsid(launcher) == os.getsid(rank):
        found["launcher"] = launcher
    return {kind: pid for kind, pid in found.items() if is_alive(pid)}


def sessions(pids: Sequence[int]) -> set[int]:
    """Of the processes; whatever they start belongs to them, too."""
    found = set()
    for pid in pids:
        with suppress(ProcessLookupError):
            found.add(os.getsid(pid))
    return found


def has_members(session: int) -> bool:
    return any(is_alive(pid) and session in sessions([pid]) for pid in psutil.pids())


def kill_session(session: int) -> None:
    for pid in psutil.pids():
        if session in sessions([pid]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# --- what the runs did, by their own records ---


def read_starts(run_folder: Path) -> list[list[dict[str, Any]]]:
    """Every line of ``metrics.jsonl``, by the start that has written it."""
    starts: list[list[dict[str, Any]]] = []
    file = run_folder / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(json.JSONDecodeError):  # cut short by a kill
            event = json.loads(line)
            if event["event"] == "start":
                starts.append([])
            starts[-1].append(event)
    return starts


def steps_of(events: list[dict[str, Any]], name: str) -> list[int]:
    return [event["step"] for event in events if event["event"] == name]


def losses_by_step(events: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    return {(event["event"], event["step"]): event["loss"] for event in events if "loss" in event}


def check_course(disturbed: Path, undisturbed: Path) -> int:
    """Each start has gone on from the newest checkpoint, and every step it made is the one that an undisturbed run
    makes; how many steps were destroyed."""
    expected = losses_by_step([event for events in read_starts(undisturbed) for event in events])
    seen: dict[tuple[str, int], float] = {}
    saved = made = destroyed = 0
    for events in read_starts(disturbed):
        begin, steps, losses = events[0]["step"], steps_of(events, "train"), losses_by_step(events)
        assert saved <= begin <= made, f"{disturbed}: a start at step {begin}; {saved} was saved and {made} made"
        assert made - begin <= CHECKPOINT_STEPS, f"{disturbed}: a start at step {begin} after {made} were made"
        assert steps == list(range(begin + 1, begin + 1 + len(steps))), f"{disturbed}: steps left out or made twice"
        assert losses.items() <= expected.items(), f"{disturbed}: other losses than undisturbed"
        destroyed += made - begin
        made = begin + len(steps)
        saved = max([begin, *steps_of(events, "checkpoint")])
        seen |= losses
    assert seen == expected, f"{disturbed}: something is missing"
    return destroyed


def outcome(search: SearchCommand) -> dict[str, Any]:
    """All that a search finds out."""
    runs = {run.name: {name: getattr(run, name) for name in FOUND} for run in search.runs()}
    return {"runs": runs, "best.yaml": (search.folder / "best.yaml").read_text()}


def weights(search: SearchCommand) -> dict[str, bytes]:
    """Of all exported models."""
    return {
        f"{folder.parent.name} {name}": tensor.numpy().tobytes()
        for folder in search.run_folders()
        if (folder / "hf").exists()
        for name, tensor in load_file(folder / "hf" / "model.safetensors").items()
    }
