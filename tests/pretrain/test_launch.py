"""A launch is one run's processes and no others: on their cores, asked to leave, ended whole, never orphaned."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from common.cli import config_parser, parse, take_config
from pretrain.architecture import ModelConfig
from pretrain.config import PretrainConfig
from pretrain.early_stop import StopRule
from pretrain.launch import (
    Launch,
    Outcome,
    RunFolder,
    as_yaml,
    cause_of,
    last_word,
    launch_command,
    launch_environment,
    read_outcome,
)
from pretrain.places import Place, find_places
from pretrain.run_record import read_metrics

REPOSITORY = Path(__file__).parents[2]
ON_CORES = Place("here, cores", 1, (), tuple(sorted(os.sched_getaffinity(0)))[:1])
ON_GPUS = Place("here, GPUs 2,5", 2, (2, 5), ())
CONFIG = PretrainConfig(
    model=ModelConfig(preset="bert-tiny", hidden_size=32),
    time_budget=None,
    max_steps=100,
    train_batch_size=24,
    micro_batch_size=4,
    validation_interval="50%",
    early_validation_interval=None,
    checkpoint_interval="50%",
    log_interval=1,
)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def living(needle: object) -> list[psutil.Process]:
    """All processes with this in their command line."""
    processes = psutil.process_iter(["cmdline", "status"])
    return [
        process
        for process in processes
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(needle) in " ".join(process.info["cmdline"] or ())
    ]


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path) -> Iterator[None]:
    yield
    for process in living(tmp_path):
        process.kill()


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "007")
    folder.run.mkdir(parents=True)
    return folder


# What a start is given


def test_a_hostfile_and_visible_devices_of_the_user_do_not_move_a_run(folder, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    command = launch_command(ON_GPUS, folder, Path("data"))
    assert command[command.index("--include") + 1] == "localhost:2,5"
    assert not Path(command[command.index("--hostfile") + 1]).is_file()
    assert "CUDA_VISIBLE_DEVICES" not in launch_environment(ON_GPUS)
    command = launch_command(ON_CORES, folder, Path("data"))
    assert command[command.index("--num_gpus") + 1] == "1"


def test_a_start_knows_nothing_of_the_launcher_of_its_coordinator(monkeypatch) -> None:
    told = ["RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"]
    told += ["MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_RUN_ID"]
    kept = ["OMP_NUM_THREADS", "SLURM_JOB_END_TIME", "RANKING", "MY_LOCAL_SIZE"]
    for name in told + kept:
        monkeypatch.setenv(name, "1")
    environment = launch_environment(ON_CORES)
    assert [name for name in told if name in environment] == []
    assert [name for name in kept if name not in environment] == []
    assert environment["BUDGET_BERT_COORDINATOR"] == str(os.getpid())


def test_the_config_of_a_start_is_read_back_as_it_was(tmp_path) -> None:
    rules = [StopRule("3h", "validation_loss", 6.0)]
    config = PretrainConfig(early_stop=rules, pause_at="12h", schedule_length="3d", export_at=[0.5])
    (tmp_path / "launch.yaml").write_text(as_yaml(config))
    parser = config_parser("test", "test", PretrainConfig)
    assert take_config(parse(parser, ["--config", str(tmp_path / "launch.yaml")]), PretrainConfig) == config


# What becomes of its processes: a tree of three in place of DeepSpeed's

TREE = """\
import os, pathlib, signal, subprocess, sys, time
folder, generation = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def leave(*_):
    (folder / "left").touch()
    time.sleep(float(sys.argv[3]))
    os._exit(75)
if generation == 2:
    signal.signal(signal.SIGTERM, leave)
(folder / f"pid-{generation}.tmp").write_text(str(os.getpid()))
os.rename(folder / f"pid-{generation}.tmp", folder / f"pid-{generation}")
if generation < 2:
    sys.exit(subprocess.call([sys.executable, "-c", sys.argv[4], *sys.argv[1:2], str(generation + 1), *sys.argv[3:]]))
print("generation 2 is there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(folder, monkeypatch) -> Callable[[], tuple[Launch, list[int]]]:
    """Starts the tree; it and the numbers of its processes, the last one in rank 0's stead."""

    def start(leaving_seconds: float = 0.0) -> tuple[Launch, list[int]]:
        command = [sys.executable, "-c", TREE, str(folder.folder), "0", str(leaving_seconds), TREE]
        monkeypatch.setattr("pretrain.launch.launch_command", lambda *_: command)
        launch = Launch.start(folder, CONFIG, Path("data"), ON_CORES)
        wait_until((folder.folder / "pid-2").exists)
        return launch, [int((folder.folder / f"pid-{generation}").read_text()) for generation in range(3)]

    return start


def say(folder: RunFolder, phase: str, pid: int, host: str | None = None) -> None:
    status = {"phase": phase, "pid": pid, "host": host or socket.gethostname()}
    (folder.run / "status.json").write_text(json.dumps(status))


def test_all_processes_of_a_launch_stay_on_its_cores_and_the_coordinator_on_its_own(start) -> None:
    before = os.sched_getaffinity(0)
    launch, pids = start()
    assert [os.sched_getaffinity(pid) for pid in pids] == [set(ON_CORES.cores)] * 3
    assert os.sched_getaffinity(0) == before
    launch.kill()


def test_a_kill_leaves_nothing_even_of_a_tree_that_has_lost_its_root(start, folder) -> None:
    launch, pids = start()
    assert launch.poll() is None
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pids[0]) or psutil.Process(pids[0]).status() == psutil.STATUS_ZOMBIE)
    assert launch.poll() is None, "its rank still works"
    launch.kill()
    assert living(folder.folder) == []
    assert launch.poll() is not None


def test_a_run_that_trains_is_asked_through_rank_0_alone_and_gets_the_time_to_save(start, folder) -> None:
    launch, pids = start(leaving_seconds=0.3)
    say(folder, "training", pids[2])
    launch.ask_to_leave()
    wait_until((folder.folder / "left").exists)
    assert launch.poll() is None
    wait_until(lambda: launch.poll() is not None)
    assert launch.poll() == 75
    assert living(folder.folder) == []


@pytest.mark.parametrize(
    "status",
    [
        None,
        {"phase": "starting", "pid": 2},
        {"phase": "training", "pid": "ours", "host": "elsewhere"},
        {"phase": "training", "pid": os.getpid()},
    ],
)
def test_a_run_that_has_not_begun_to_train_is_ended_whatever_an_earlier_start_has_left(start, folder, status) -> None:
    launch, pids = start()
    if status:
        pid = status["pid"] if status["pid"] == os.getpid() else pids[2]
        say(folder, status["phase"], pid, status.get("host"))
    launch.ask_to_leave()
    assert living(folder.folder) == []
    assert not (folder.folder / "left").exists()


def test_ranks_that_do_not_leave_without_their_launcher_are_ended_in_the_end(start, folder, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.launch._LEAVING_SECONDS", 0.2)
    launch, pids = start()
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: launch.poll() is not None, 10.0)
    assert launch.poll() == -signal.SIGKILL
    assert living(folder.folder) == []


def test_the_output_of_all_starts_is_kept_and_each_start_knows_its_own(start, folder) -> None:
    folder.output.write_text("error: what an earlier start has died of\n")
    launch, _ = start()
    wait_until(lambda: "generation 2" in folder.output.read_text())
    launch.kill()
    assert folder.output.read_text().startswith("error: what an earlier start has died of\ngeneration 2")
    assert cause_of(folder, -9, launch.output_offset).startswith("killed from outside")


def test_the_launches_are_a_line_each_though_one_was_cut_short(start, folder) -> None:
    launch, _ = start()
    launch.kill()
    launch.end(75, "first")
    with folder.launches.open("a") as file:
        file.write('{"begun": 17')
    launch.end(None, "second")
    launch.end(0, "third")
    first, cut_short, *others = folder.launches.read_text().splitlines()
    assert cut_short == '{"begun": 17'
    launches = [json.loads(line) for line in (first, *others)]
    assert [line["cause"] for line in launches] == ["first", "second", "third"]
    assert [line["exit_code"] for line in launches] == [75, None, 0]
    assert launches[0].keys() == {"begun", "ended", "place", "exit_code", "cause"}
    assert time.time() - 60 < launches[0]["begun"] <= launches[0]["ended"] <= time.time()


# What a run says of its end


@pytest.mark.parametrize(
    ("stopped_by", "because", "pause_at", "expected"),
    [
        ("time_budget", None, "12h", Outcome("time_budget", None)),
        ("early_stop", "too bad", None, Outcome("early_stop", "too bad")),
        ("diverged", "nan", "12h", Outcome("diverged", "nan")),
        ("pause", "pause_at 12h", "12h", Outcome("pause", "pause_at 12h")),
        ("pause", "pause_at 12h", "18h", None),
        ("pause", "pause_at 12h", None, None),
        ("SIGTERM", None, "12h", None),
        ("launcher_died", None, None, None),
    ],
)
def test_a_run_has_an_outcome_where_nothing_is_left_to_do_before_its_mark(
    folder, stopped_by, because, pause_at, expected
) -> None:
    config = replace(PretrainConfig(), pause_at=pause_at)
    assert read_outcome(folder, config) is None, "no summary"
    (folder.run / "summary.json").write_text(json.dumps({"stopped_by": stopped_by, "stopped_because": because}))
    assert read_outcome(folder, config) == expected


@pytest.mark.parametrize(
    ("printed", "code", "cause"),
    [
        ("step 9, 5 s\nstopped by SIGTERM after step 9, 5.0 s spent, all saved", 75, "stopped by SIGTERM"),
        ("[ERROR] [launch.py:259:sigkill_handler] ['python'] exits with return code = -9", 247, "killed from outside"),
        ("error: disk full\n[ERROR] [launch.py:259] ['python'] exits with return code = 2", 2, "disk full"),
    ],
)
def test_the_cause_of_an_end_is_what_the_run_or_its_launcher_has_said_last(folder, printed, code, cause) -> None:
    folder.output.write_text(printed)
    assert cause_of(folder, code, 0).startswith(cause)
    assert last_word("", 1) == "ended with code 1 and no word"


# Real runs


def steps(folder: RunFolder) -> list[int]:
    return [event["step"] for event in read_metrics(folder.run) if event["event"] == "train"]


def printed(folder: RunFolder) -> str:
    return folder.output.read_text(errors="replace")[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_runs_side_by_side_stay_on_their_cores_pause_and_go_on_to_their_end(data_dir, tmp_path) -> None:
    places = find_places(1, needed=2)[:2]
    folders = [RunFolder(tmp_path / place.name[-1]) for place in places]
    configs = [replace(CONFIG, pause_at="50%"), CONFIG]
    for config, expected in zip(configs, ("pause", "max_steps"), strict=True):
        launches = [
            Launch.start(folder, config, data_dir, place) for folder, place in zip(folders, places, strict=True)
        ]
        seen, gpus_of_ranks = set(), set()
        while any(launch.poll() is None for launch in launches):
            for name, process in (
                (folder.folder.name, process) for folder in folders for process in living(folder.run)
            ):
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen.add((name, tuple(process.cpu_affinity())))
                    if "RANK" in process.environ():
                        gpus_of_ranks.add(process.environ()["CUDA_VISIBLE_DEVICES"])
            time.sleep(0.2)
        assert seen == {(place.name[-1], place.cores) for place in places}
        assert gpus_of_ranks == {""}, "hidden GPUs stay hidden"
        for folder in folders:
            assert read_outcome(folder, config).stopped_by == expected, printed(folder)
            assert "on 1 x CPU, 1 thread each" in printed(folder)
    assert steps(folders[0]) == list(range(1, 101))


@pytest.mark.slow
def test_a_real_run_saves_when_asked_to_leave_and_survives_a_kill(data_dir, folder) -> None:
    config = replace(CONFIG, max_steps=100_000)
    launch = Launch.start(folder, config, data_dir, ON_CORES)
    wait_until(lambda: len(steps(folder)) > 5)
    launch.ask_to_leave()
    wait_until(lambda: launch.poll() is not None)
    assert (launch.poll(), read_outcome(folder, config)) == (75, None), printed(folder)
    assert cause_of(folder, 75, launch.output_offset) == "stopped by SIGTERM"
    saved = json.loads((folder.run / "summary.json").read_text())["steps"]
    launch = Launch.start(folder, config, data_dir, ON_CORES)
    wait_until(lambda: steps(folder)[-1] > saved + 5)
    launch.kill()
    assert living(folder.run) == []
    assert read_outcome(folder, config) is None
    assert "killed" in cause_of(folder, launch.poll(), launch.output_offset)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed.launcher.runner", "deepspeed.launcher.launch"])
def test_a_launch_whose_launcher_is_killed_lasts_until_the_run_has_saved(data_dir, folder, name) -> None:
    launch = Launch.start(folder, replace(CONFIG, max_steps=100_000), data_dir, ON_CORES)
    wait_until(lambda: len(steps(folder)) > 5)
    (victim,) = (process for process in living(folder.run) if name in process.cmdline())
    victim.kill()
    wait_until(lambda: launch.poll() is not None)
    assert living(folder.run) == []
    assert cause_of(folder, launch.poll(), launch.output_offset) == "stopped by launcher_died"
    assert (folder.run / "checkpoints" / "latest").exists()


COORDINATE = """\
import sys, time
from pathlib import Path
from common.cli import config_parser, parse, take_config
from pretrain.config import PretrainConfig
from pretrain.launch import Launch, RunFolder
from pretrain.places import find_places
config = take_config(parse(config_parser("", "", PretrainConfig), ["--config", sys.argv[1]]), PretrainConfig)
Launch.start(RunFolder(Path(sys.argv[2])), config, Path(sys.argv[3]), find_places(1, 1)[0])
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["launcher starts", "rank starts", "training"])
def test_a_run_does_not_outlive_its_coordinator_and_loses_nothing(data_dir, folder, tmp_path, moment) -> None:
    config = replace(CONFIG, max_steps=100_000)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    arguments = [str(tmp_path / "config.yaml"), str(folder.folder), str(data_dir)]
    coordinator = subprocess.Popen([sys.executable, "-c", COORDINATE, *arguments], cwd=REPOSITORY)
    has_come = {
        "launcher starts": lambda: living(folder.run),
        "rank starts": lambda: any(
            "run_pretraining.py" in process.info["cmdline"][2] for process in living(folder.run)
        ),
        "training": lambda: len(steps(folder)) > 5,
    }
    wait_until(has_come[moment])
    coordinator.kill()
    coordinator.wait()
    wait_until(lambda: not living(folder.run))
    assert "stopped by launcher_died" in printed(folder), printed(folder)
    saved = json.loads((folder.run / "summary.json").read_text())["steps"]
    if moment != "training":
        assert saved == 0
        return
    assert saved > 5
    launch = Launch.start(folder, config, data_dir, ON_CORES)
    wait_until(lambda: steps(folder)[-1] > saved)
    launch.kill()
    starts = [event["step"] for event in read_metrics(folder.run) if event["event"] == "start"]
    assert starts == [0, saved]
