"""Whatever stage and precision a checkpoint was saved at, its files give the float32 weights that were trained."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from pretrain.weight_files import read_weights

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("save_at_every_stage.py")

STAGES = {"fp32": 0, "autocast": 0, "zero1": 1, "bf16_zero1": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of two processes at every stage, and beside each what DeepSpeed itself gathers."""
    folder = tmp_path_factory.mktemp("stages")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_those_that_the_optimizer_holds(name, saved) -> None:
    weights, expected = read_weights(saved / name, STAGES[name], 2), load_file(saved / f"{name}.safetensors")
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[key]), key


def test_sharding_does_not_change_the_weights(saved) -> None:
    whole, sharded = read_weights(saved / "fp32", 0, 2), read_weights(saved / "zero1", 1, 2)
    for key, tensor in whole.items():
        torch.testing.assert_close(sharded[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_half_precision_copies_are_not_taken_for_the_weights(saved) -> None:
    weights = read_weights(saved / "bf16_zero1", 1, 2)
    rounded = torch.load(saved / "bf16_zero1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert any(not torch.equal(weights[key], rounded[key].float()) for key in weights)
    for key, tensor in weights.items():
        assert torch.equal(tensor.bfloat16(), rounded[key]), key


class Intruder:
    """What a pickled file could run."""

    def __reduce__(self) -> tuple:
        return print, ("intruded",)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


MODEL, RANK_1 = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / MODEL).unlink(), "no \\*_model_states.pt"),
        (lambda folder: (folder / RANK_1).unlink(), "of rank 1: of 2 processes"),
        (lambda folder: truncate(folder / MODEL), "model_states.pt is damaged"),
        (lambda folder: truncate(folder / RANK_1), "optim_states.pt is damaged"),
        (lambda folder: (folder / RANK_1).write_bytes(b""), "optim_states.pt is damaged"),
        (lambda folder: torch.save(Intruder(), folder / MODEL), "model_states.pt is damaged or not DeepSpeed's"),
        (lambda folder: torch.save({"weights": {}}, folder / MODEL), "not as DeepSpeed writes them"),
        (lambda folder: torch.save([1, 2], folder / RANK_1), "not as DeepSpeed writes them"),
    ],
)
def test_damaged_files(damage, words, saved, tmp_path, capsys) -> None:
    folder = shutil.copytree(saved / "bf16_zero1", tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(UserError, match=words) as refusal:
        read_weights(folder, 1, 2)
    assert "\n" not in str(refusal.value)
    assert "intruded" not in capsys.readouterr().out
