"""The number of processes changes nothing: not the validation, and not a run that goes on with another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MegatronBertForMaskedLM

from data_prep.shards import SplitReader, read_manifest
from pretrain.architecture import resolve
from pretrain.hugging_face import to_hugging_face
from pretrain.model import MaskedLanguageModel
from tests.pretrain.ranks_process import CONFIG, OPTIMIZERS

SCRIPT = Path(__file__).parent / "ranks_process.py"
CHANGES = ((1, 2), (2, 3), (2, 1))


@pytest.fixture(scope="module")
def results(data_dir, tmp_path_factory) -> Path:
    """One, two and three processes, each going on from the checkpoints of the ones before it."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for world_size, sources in ((1, ()), (2, ("1",)), (3, ("2",)), (1, ("2",))):
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", str(world_size), "--standalone"]
        command = [*torchrun, str(SCRIPT), str(data_dir), str(folder), *sources]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def assert_same_weights(one: Path, other: Path) -> None:
    expected = load_file(other)
    for name, tensor in load_file(one).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_trains_the_same_weights(world_size, optimizer, results) -> None:
    assert_same_weights(results / f"{world_size}-{optimizer}.safetensors", results / f"1-{optimizer}.safetensors")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_with_another_number_of_processes(before, after, optimizer, results) -> None:
    resumed = results / f"{before}-to-{after}-{optimizer}.safetensors"
    assert_same_weights(resumed, results / f"1-{optimizer}.safetensors")


def test_validation_is_identical_for_any_number_of_processes(results) -> None:
    one, two, three = (json.loads((results / f"validation-{number}.json").read_text()) for number in (1, 2, 3))
    assert one == two == three


def test_validation_is_the_mean_over_all_predictions_of_the_held_out_rows(results, data_dir) -> None:
    """Hugging Face's model, every row by itself."""
    manifest = read_manifest(data_dir)
    torch.manual_seed(0)
    architecture = resolve(CONFIG, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
    model = to_hugging_face(MaskedLanguageModel(architecture)).eval()
    assert isinstance(model, MegatronBertForMaskedLM)
    reader = SplitReader(manifest, "validation")
    rows = reader.read_range(0, reader.num_rows)
    reader.close()
    losses, hits = [], []
    for ids, length, positions, labels in zip(
        rows.input_ids, rows.sequence_length, rows.masked_lm_positions, rows.masked_lm_ids, strict=True
    ):
        used = positions > 0
        inputs = torch.tensor(ids[: int(length)].astype("int64"))[None]
        with torch.no_grad():
            logits = model(inputs).logits[0, torch.tensor(positions[used].astype("int64"))]
        labels = torch.tensor(labels[used].astype("int64"))
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(dim=-1) == labels)
    figures = json.loads((results / "validation-2.json").read_text())
    assert figures["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert figures["accuracy"] == pytest.approx(torch.cat(hits).float().mean().item(), abs=1e-6)
