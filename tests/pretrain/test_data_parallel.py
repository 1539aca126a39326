"""The gradient of a global batch is one and the same on any number of processes: that of its mean loss."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data_prep.shards import SplitReader, read_manifest
from pretrain.architecture import ModelConfig, resolve
from pretrain.hugging_face import to_hugging_face
from pretrain.model import MaskedLanguageModel

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).parent / "torchrun"
SLOTS = 72  # so few that the batch of 24 needs more than its 6 micro-batches of 4, and a rank more than another


def gradients_of(world_size: int, data_dir: Path, output: Path, port: int) -> dict[str, torch.Tensor]:
    launcher = [TORCHRUN, "--nproc_per_node", world_size, "--master_port", port]
    arguments = [*launcher, "tests/pretrain/gradient_process.py", data_dir, SLOTS, output]
    done = subprocess.run(list(map(str, arguments)), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def of_hugging_face(data_dir) -> dict[str, torch.Tensor]:
    """Loss and two gradients of the whole batch at once, padded, with the dense head."""
    manifest = read_manifest(data_dir)
    reader = SplitReader(manifest, "train")
    rows = reader.read_range(0, 24)
    reader.close()
    torch.manual_seed(0)
    config = ModelConfig(preset="bert-tiny", hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLanguageModel(resolve(config, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id))
    reference = to_hugging_face(model)
    ids, lengths = torch.from_numpy(rows.input_ids.astype("int64")), torch.from_numpy(rows.sizes.tokens)
    labels = torch.full_like(ids, -100)
    row, slot = rows.masked_lm_positions.nonzero()
    labels[row, rows.masked_lm_positions[row, slot].astype("int64")] = torch.from_numpy(
        rows.masked_lm_ids[row, slot].astype("int64")
    )
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    logits = reference(input_ids=ids, attention_mask=mask.long()).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    dense = reference.cls.predictions.transform.dense.weight.grad
    output = reference.bert.encoder.layer[1].output.dense.weight.grad
    return {"loss": loss.detach(), "head.dense.weight": dense, "layers.1.output.weight": output}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradient_is_that_of_the_whole_batch(
    world_size: int, of_hugging_face, data_dir, tmp_path, free_port
) -> None:
    gradients = gradients_of(world_size, data_dir, tmp_path / "gradients.safetensors", free_port)
    per_rank = gradients["micro_batches"].tolist()
    assert len(per_rank) == world_size
    assert sum(per_rank) > 6, "the batch was to need more micro-batches"
    for name, expected in of_hugging_face.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6, msg=name)
