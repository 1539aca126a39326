"""Weights & Biases never asks, never stops a run, and goes on with a run that was resumed.

A stand-in for the package does what its documentation says; the last test takes the real one where it is installed.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from pretrain.metrics import MetricsWriter
from pretrain.run_record import read_metrics
from pretrain.trackers import WandbTracker, check_wandb


class Error(Exception):
    """The package's own."""


class StandIn:
    """The package: what a run logs is in ``logged``, and ``failing`` names what raises."""

    __version__ = "0.31.0"
    Error = Error

    def __init__(self, key: bool = True, mode: str = "online", failing: tuple[str, ...] = ()) -> None:
        self.key, self.mode, self.failing = key, mode, failing
        self.starts: list[dict] = []
        self.logged: list[dict] = []
        self.prompts = 0

    def Settings(self, **values) -> SimpleNamespace:
        return SimpleNamespace(**values)

    def setup(self, settings) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt: bool = True, verify: bool = True) -> bool:
        self.prompts += prompt
        return self.key

    def teardown(self) -> None: ...

    def init(self, **options) -> "StandIn":
        self._fail(f"init {options.get('mode', 'online')}")
        self.starts.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, values: dict) -> None:
        self._fail("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._fail("finish")

    def _fail(self, action: str) -> None:
        if action in self.failing:
            raise Error(f"no\nnetwork for {action}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 7\n")
    return run


def install(monkeypatch, **options) -> StandIn:
    package = StandIn(**options)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def write_two_events(folder: Path, rank: int = 0) -> None:
    metrics = MetricsWriter(folder, rank, total=10, unit="s", spent=0, wandb=True)
    metrics.write("start", 3, 1.0)
    metrics.write("train", 4, 2.5, loss=1.5, learning_rate=0.1)
    metrics.write("stop", 4, 2.5, stopped_by="time_budget")
    metrics.close()


def test_without_a_key_it_is_refused_and_nothing_is_asked(monkeypatch) -> None:
    package = install(monkeypatch, key=False)
    with pytest.raises(UserError, match="run `wandb login` once or set WANDB_API_KEY; or WANDB_MODE=offline"):
        check_wandb()
    assert package.prompts == 0


@pytest.mark.parametrize("options", [{}, {"key": False, "mode": "offline"}, {"key": False, "mode": "disabled"}])
def test_a_key_or_a_mode_without_one_is_enough(options, monkeypatch) -> None:
    install(monkeypatch, **options)
    check_wandb()


def test_a_missing_or_old_package_is_one_line_on_rank_0_alone(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb()
    monkeypatch.setenv("RANK", "1")
    check_wandb()
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(StandIn, "__version__", "0.19.11")
    install(monkeypatch)
    with pytest.raises(UserError, match="pip install --upgrade wandb"):
        check_wandb()


def test_numbers_of_events_are_sent_with_step_and_time(folder: Path, monkeypatch) -> None:
    package = install(monkeypatch)
    write_two_events(folder)
    assert package.logged == [{"step": 4, "elapsed_seconds": 2.5, "train/loss": 1.5, "train/learning_rate": 0.1}]
    assert package.starts[0]["config"] == {"seed": 7}


def test_a_resumed_run_goes_on_under_its_id_and_another_folder_has_another(folder: Path, monkeypatch) -> None:
    package = install(monkeypatch)
    write_two_events(folder)
    moved = folder.rename(folder.with_name("moved"))
    write_two_events(moved)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 7\n")
    write_two_events(folder)
    first, second, other = (start["id"] for start in package.starts)
    assert first == second != other
    assert first.startswith("my-run-")
    assert all(start["resume"] == "allow" for start in package.starts)


def test_only_rank_0_sends(folder: Path, monkeypatch) -> None:
    package = install(monkeypatch)
    write_two_events(folder, rank=1)
    assert package.starts == []


@pytest.mark.parametrize("failing", ["log", "finish", "init offline"])
def test_a_failure_ends_w_and_b_and_not_the_run(failing: str, folder: Path, monkeypatch, capsys) -> None:
    package = install(monkeypatch, failing=(failing, "init online") if "init" in failing else (failing,))
    write_two_events(folder)
    assert [event["event"] for event in read_metrics(folder)] == ["start", "train", "stop"]
    assert f"no more W&B (no network for {failing})" in capsys.readouterr().out
    assert len(package.logged) == (failing == "finish")


def test_what_can_not_be_reached_at_the_start_is_kept_for_later(folder: Path, monkeypatch) -> None:
    package = install(monkeypatch, failing=("init online",))
    said: list[str] = []
    tracker = WandbTracker(folder, said.append)
    tracker.log("train", 1, 1.0, {"loss": 2.0})
    assert [start["mode"] for start in package.starts] == ["offline"]
    assert len(package.logged) == 1
    assert len(said) == 1
    assert "wandb sync" in said[0]
    assert "\n" not in said[0]


def test_the_real_package_keeps_a_run_and_its_resume_offline(folder: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="an optional dependency: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
    for _ in range(2):
        write_two_events(folder)
    wandb.teardown()  # its own process ends, and has written all
    run_id = (folder / "wandb_id").read_text().strip()
    kept = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in kept} == {f"run-{run_id}.wandb"}
    assert all(b"train/learning_rate" in path.read_bytes() for path in kept)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "stop"
