"""A checkpoint is whole or not there; what can't be gone on from is told in a line before anything is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from pretrain.checkpoint import (
    Checkpoints,
    Setting,
    TrainState,
    best_checkpoint,
    check_resumable,
    find_checkpoint,
    latest_checkpoint,
    read_record,
    read_state,
)

SETTING = Setting("the data", {"hidden_size": 2}, "adamw", zero_stage=0, world_size=2)


class FilesOnly:
    """What a DeepSpeed engine at stage 0 leaves in a checkpoint, without the engine."""

    processes = SimpleNamespace(barrier=lambda: None)

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        torch.save({"module": {"weight": torch.ones(100)}}, folder / tag / "mp_rank_00_model_states.pt")


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tokenizer.json").chmod(0o444)
    tokenizer.chmod(0o555)  # as on a shared disk
    return Checkpoints(tmp_path / "run", tokenizer, keep=2, rank=0)


def state(step: int, validation_loss: float | None = None) -> TrainState:
    spent = {"training": 1.0, "validation": 0.5}
    return TrainState(step, 8 * step, 0, spent, 4, {"step": 0.1}, validation_loss, {"train_loss": 3.0}, None, SETTING)


def save(checkpoints: Checkpoints, step: int, validation_loss: float | None = None) -> Path:
    checkpoints.save(FilesOnly(), step, lambda: state(step, validation_loss), {"steps": step})
    newest = checkpoints.latest()
    assert newest is not None
    return newest


def test_state_record_and_tokenizer_come_back(checkpoints, tmp_path) -> None:
    checkpoint = save(checkpoints, 3)
    assert latest_checkpoint(tmp_path / "run") == checkpoint
    assert read_state(checkpoint) == state(3)
    assert read_state(checkpoint).elapsed_seconds == 1.5
    assert read_record(checkpoint) == {"steps": 3}
    copy = checkpoint / "tokenizer" / "tokenizer.json"
    assert copy.read_text() == "{}"
    assert copy.stat().st_mode & 0o200, "a copy that its owner can't remove"
    assert copy.parent.stat().st_mode & 0o200


def test_the_newest_ones_are_kept(checkpoints, tmp_path) -> None:
    for step in (1, 5, 9):
        save(checkpoints, step)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000005", "step-00000009"]


def test_the_best_one_stays_however_old_it_is(checkpoints, tmp_path) -> None:
    losses = {1: 5.0, 3: 2.0, 5: None, 7: 4.0, 9: None}
    for step, loss in losses.items():
        save(checkpoints, step, loss)
    folder = tmp_path / "run" / "checkpoints"
    assert best_checkpoint(tmp_path / "run") == find_checkpoint(folder / "best") == folder / "step-00000003"
    kept = sorted(path.name for path in folder.glob("step-*"))
    assert kept == ["step-00000003", "step-00000007", "step-00000009"]
    assert find_checkpoint(folder / "latest") == folder / "step-00000009"


def test_a_loss_that_is_known_later_may_make_the_newest_one_the_best(checkpoints, tmp_path) -> None:
    save(checkpoints, 1, 2.0)
    newest = save(checkpoints, 2)
    checkpoints.set_validation_loss(1.5)
    assert best_checkpoint(tmp_path / "run") == newest
    assert read_state(newest) == state(2, 1.5)


def test_a_step_that_is_saved_is_not_saved_again(checkpoints) -> None:
    assert checkpoints.save(FilesOnly(), 1, lambda: state(1), {})
    assert not checkpoints.save(FilesOnly(), 1, lambda: state(1), {})


def test_a_save_that_was_killed_leaves_the_one_before(checkpoints, tmp_path) -> None:
    class Killed(FilesOnly):
        def save(self, folder: Path, tag: str) -> None:
            super().save(folder, tag)
            raise KeyboardInterrupt

    first = save(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(Killed(), 2, lambda: state(2), {})
    assert checkpoints.latest() == first
    assert read_state(first).step == 1
    next_start = Checkpoints(tmp_path / "run", tmp_path / "tokenizer", keep=2, rank=0)
    assert not (tmp_path / "run" / "checkpoints" / "writing").exists()
    assert read_state(save(next_start, 3)).step == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest_sha256": "other data"}, "another data folder"),
        ({"architecture": {"hidden_size": 4}}, "hidden_size differ"),
        ({"optimizer": "lamb"}, "state of optimizer adamw: lamb can.t go on"),
        ({"zero_stage": 1}, "saved at ZeRO stage 0, ds_config has stage 1"),
    ],
)
def test_a_checkpoint_of_another_setting(change, words, checkpoints) -> None:
    checkpoint = save(checkpoints, 1)
    check_resumable(checkpoint, SETTING, replace(SETTING, world_size=5))  # stage 0 loads on any number of processes
    with pytest.raises(UserError, match=words):
        check_resumable(checkpoint, SETTING, replace(SETTING, **change))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "not whole"),
        (truncate, "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
    ],
)
def test_a_checkpoint_with_damaged_weights(damage, words, checkpoints) -> None:
    checkpoint = save(checkpoints, 1)
    damage(checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=words) as refusal:
        check_resumable(checkpoint, SETTING, SETTING)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"setting": null}', '{"setting": {}}', None])
def test_a_state_that_is_not_ours(content, checkpoints) -> None:
    checkpoint = save(checkpoints, 1)
    (checkpoint / "state.json").unlink()
    if content is not None:
        (checkpoint / "state.json").write_text(content)
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        read_state(checkpoint)


def test_a_state_with_more_in_it(checkpoints) -> None:
    """Of a newer version of this program, say."""
    checkpoint = save(checkpoints, 1)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "mood": "good"}))
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        read_state(checkpoint)


def test_a_record_that_was_lost(checkpoints) -> None:
    checkpoint = save(checkpoints, 1)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"pretraining.json does not exist"):
        read_record(checkpoint)
