"""The command `python -m pretrain search`: what it refuses before it begins, what it leaves behind."""

import contextlib
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from common import storage
from common.folders import file_lock
from pretrain import fingerprint, search, search_record
from pretrain.study import SearchStore
from tests.pretrain.made_machine import Fate, Killed, Machine
from tests.pretrain.search_command import refused, run_command, write_config


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Runs are made up: see :mod:`tests.pretrain.made_machine`."""
    made = Machine()
    made.stand_in(monkeypatch)
    monkeypatch.setattr(fingerprint, "code_checksums", lambda: {"pretrain/model.py": "4567"})  # of one file, not of all
    return made


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Figures take longer than the rest of a search that is made up."""
    monkeypatch.setattr(search_record, "write_report", lambda *_: None)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path, data_dir, machine) -> Command:
    """Runs the command on ``search.yaml`` into ``S``: exit code, and the line of the error if there is one."""

    def run(*more: object, config: Path | None = None) -> tuple[int, str]:
        given = ["--config", config or write_config(tmp_path), "--data_dir", data_dir, "--output_dir", tmp_path / "S"]
        return run_command("search", *given, *more)

    return run


# --- what is refused before anything is written ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, ["space is empty"]),
        ({"space": {"seed": []}}, ["seed has no values"]),
        ({"space": {"seed": [1, 1]}}, ["seed has 1 twice"]),
        ({"space": {"sed": [1]}}, ["no option sed; the nearest is seed"]),
        ({"space": {"warmup_proportion": [0.1, 1.5]}}, ["warmup_proportion 1.5"]),
        ({"space": {"seed": {"low": 1, "high": 9}}}, ["seed is a range, which a grid cannot try"]),
        ({"space": {"max_steps": [1, 2]}}, ["max_steps cannot vary"]),
        ({"space": {"train_batch_size": [24, 25]}}, ["train_batch_size 25"]),
        ({"space": {"model.num_attention_heads": [2, 3]}}, ["model.num_attention_heads 3", "hidden_size"]),
        ({"space": {"model.preset": ["bert-tiny", "bert-huge"]}}, ["model.preset", "bert-huge"]),
        ({"rungs": [{"at": "100%", "keep": "below 6.0"}]}, ["rung at 100%", "not before the end"]),
        ({"rungs": [{"at": "3h", "keep": "below 6.0"}]}, ["rung at 3h"]),
        ({"rungs": [{"at": "50%", "keep": "the best"}]}, ["'the best'", "'below 6.0'", "'top 50 %'"]),
        ({"sampler": "tpe"}, ["needs num_runs"]),
        ({"sampler": "random", "num_runs": 5}, ["more than the 4 combinations"]),
        ({"gpus_per_run": 1000, "space": {"train_batch_size": [24_000]}}, ["gpus_per_run 1000", socket.gethostname()]),
        ({"gpus_per_run": 0}, ["gpus_per_run must be at least 1"]),
        ({"storage": "mysql://host/studies"}, ["mysql://host/studies", "postgresql"]),
        ({"storage": "studies"}, ["the storage studies cannot be opened", "URL"]),
        ({"storage": "sqlite:////nowhere/studies.db"}, ["/nowhere/studies.db", "there is no folder /nowhere"]),
        ({"unknown": 1}, ["unknown"]),
    ],
    ids=str,
)
def test_bad_configurations_end_in_one_line_and_nothing_is_written(changes, words, command: Command, tmp_path) -> None:
    refused(command(config=write_config(tmp_path, **changes)), *words)
    assert not (tmp_path / "S").exists()


def test_a_data_folder_that_is_not_there(command: Command, tmp_path) -> None:
    refused(command("--data_dir", tmp_path / "nowhere"), "nowhere does not exist")
    assert not (tmp_path / "S").exists()


def test_an_output_folder_of_something_else_keeps_what_it_has(command: Command, tmp_path) -> None:
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "thesis.txt").write_text("mine")
    refused(command(), "is not empty and not ours")
    assert [file.name for file in (tmp_path / "S").iterdir()] == ["thesis.txt"]


@pytest.fixture
def busy_seconds(monkeypatch) -> None:
    """A locked file is waited for no longer."""
    monkeypatch.setattr(storage, "_BUSY_SECONDS", 0.1)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another process writes to a database and does not come to an end."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_storages_that_cannot_be_used(command: Command, tmp_path, busy_seconds) -> None:
    file = tmp_path / "a.db"
    url = f"sqlite:///{file}"
    with locked(file):
        refused(command("--storage", url), str(file), "locked")
    optuna.create_study(storage=url, study_name="rte")
    before = file.read_bytes()
    refused(command("--storage", url), "study 'rte' of something else")
    assert file.read_bytes() == before
    file.write_text("This is a letter to my aunt.\n" * 100)
    refused(command("--storage", url), str(file), "not a database")
    assert file.read_text().startswith("This is a letter")
    assert not (tmp_path / "S").exists()


# --- what a search does not go on with ---


@pytest.mark.usefixtures("no_report")
def test_a_search_goes_on_only_with_what_it_was_begun_with(command: Command, tmp_path, data_dir, monkeypatch) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    assert command("--storage", url)[0] == 0
    refused(command("--storage", url, "--pretrain.max_steps", 32), "pretrain.max_steps: 16 there, 32 now")
    elsewhere = ["--storage", url, "--output_dir", tmp_path / "T"]
    refused(command(*elsewhere, "--pretrain.max_steps", 32), "never mixes budgets", "max_steps was 16, is 32")
    other_data = tmp_path / "data"
    shutil.copytree(data_dir, other_data)
    (other_data / "manifest.json").write_text((data_dir / "manifest.json").read_text() + " ")
    refused(command("--storage", url, "--data_dir", other_data), "data was ")
    with monkeypatch.context() as another_machine:
        another_machine.setattr(search, "hardware_of", lambda place: "8 x NVIDIA H200")
        refused(command("--storage", url), "hardware was ", "is 8 x NVIDIA H200")
    with monkeypatch.context() as newer:
        newer.setattr(fingerprint, "code_checksums", lambda: {"pretrain/model.py": "0123"})
        refused(command("--storage", url), "(code of pretrain/model.py was 4567, is 0123)")
    assert not (tmp_path / "T").exists()
    assert command("--storage", url)[0] == 0


@pytest.mark.usefixtures("no_report")
def test_a_folder_has_one_coordinator_at_a_time(command: Command, tmp_path, machine) -> None:
    (tmp_path / "S").mkdir()
    with file_lock(tmp_path / "S" / ".lock"):
        (tmp_path / "S" / ".lock").write_text("process 1 on node3")
        refused(command(), "process 1 on node3 is at work in")
    assert machine.launches == []
    assert command()[0] == 0


# --- what happens to it on the way ---


@pytest.mark.usefixtures("no_report")
def test_a_search_that_is_asked_to_leave_tells_so_by_its_exit_code_and_goes_on(
    command: Command, tmp_path, machine
) -> None:
    machine.at[5.5] = lambda: os.kill(os.getpid(), 15)
    assert command()[0] == 75
    assert run_command("status", tmp_path / "S")[0] == 75
    assert {launch.cause for launch in machine.launches} == {"stopped by SIGTERM", "early_stop"}
    assert command()[0] == 0
    assert run_command("status", tmp_path / "S")[0] == 0


def fills_up(stores: list[SearchStore]) -> None:
    engine = stores[-1]._storage.engine
    sqlalchemy.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
    stores[-1]._storage.remove_session()
    engine.dispose()  # the next connection has no room


@pytest.mark.usefixtures("no_report")
def test_a_storage_that_fills_up_or_is_locked_on_the_way_ends_the_search_in_one_line(
    command: Command, tmp_path, machine, monkeypatch, busy_seconds
) -> None:
    stores: list[SearchStore] = []
    monkeypatch.setattr(search, "SearchStore", lambda *given: stores.append(SearchStore(*given)) or stores[-1])
    machine.fates[0].append(
        Fate(3, 2, "it is not finite " * 1000, diverged=True)
    )  # more than the last page has room for
    machine.at[2.5] = lambda: fills_up(stores)
    refused(command(), "trials.db does not take what has to be recorded", "full", "the same command")
    assert all(launch.asked for launch in machine.living())
    machine.coordinator_is_gone()
    with contextlib.ExitStack() as others:
        machine.at[machine.now + 5.5] = lambda: others.enter_context(locked(tmp_path / "S" / "trials.db"))
        refused(command(), "does not take what has to be recorded", "locked")
    machine.coordinator_is_gone()
    assert command()[0] == 0
    assert run_command("status", tmp_path / "S")[0] == 0
    trained = sum(launch.step - launch.first_step for launch in machine.launches)
    assert trained == 3 + 4 + 16 + 8, "nothing is lost"


@pytest.mark.usefixtures("no_report")
def test_a_kill_right_after_the_study_was_made_leaves_a_search_that_begins(command: Command, monkeypatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as killing:
        killing.setattr(optuna.Study, "set_user_attr", die)
        with pytest.raises(Killed):
            command()
    assert command()[0] == 0


# --- looking at it ---


def test_folders_that_are_no_search_or_have_not_begun(command: Command, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("status", "report"):
        output = [] if name == "status" else ["--output_dir", tmp_path / "report"]
        refused(run_command(name, tmp_path / "empty", *output), "empty")
    begun = tmp_path / "begun"
    begun.mkdir()
    write_config(begun, sampler="grid").rename(begun / "config.yaml")
    for name in ("status", "report"):
        refused(run_command(name, begun), "begun has no runs yet")
    assert [file.name for file in begun.iterdir()] == ["config.yaml"]
