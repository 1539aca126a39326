"""The GPU benchmark where there is no GPU: its self-check runs every part, and what it compares is comparable."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.glue_sides import make_random_model
from benchmarks.gpu_rows import RowSource, to_batch, with_dense_head
from benchmarks.gpu_sections import SECTIONS
from benchmarks.gpu_sides import Hardware, HuggingFace, InBareLoop
from benchmarks.gpu_timing import Attempts
from common.errors import UserError
from pretrain.architecture import ModelConfig, resolve
from pretrain.ds_config import DS_CONFIGS
from pretrain.engine import Processes
from pretrain.hugging_face import to_hugging_face
from pretrain.model import MaskedLanguageModel

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = RowSource(vocab_size=200, max_seq_length=32, max_predictions_per_seq=5)


@pytest.fixture(scope="module")
def figures() -> dict:
    return self_check([name for name in SECTIONS if name != "grid"])


def self_check(sections: list[str], *options: str) -> dict:
    command = [sys.executable, "benchmarks/gpu.py", "--self-check", "--sections", *sections, *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_self_check_runs_every_section_and_nothing_fails(figures) -> None:
    assert figures["section_seconds"].keys() == SECTIONS.keys() - {"grid"}
    assert figures["failures"] == []
    assert all("apex" in what or "deepspeed" in what for what in figures["no_result"]), figures["no_result"]


@pytest.mark.slow
def test_the_self_check_fine_tunes_one_at_a_time_and_several_at_once(tmp_path) -> None:
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n", encoding="utf-8")
    model = make_random_model(tmp_path / "model", tmp_path / "words.txt", hidden_size=24, num_hidden_layers=1)
    figures = self_check(["grid"], "--glue-model", str(model))
    assert figures["failures"] == []
    assert figures["no_result"] == {}
    assert figures["grid_data"] == "synthetic (not comparable)"
    assert figures["grid_demo_sentiment_trials_per_hour_of_2"] > 0


@pytest.mark.slow
def test_the_checks_have_compared_every_path_that_a_cpu_has(figures) -> None:
    checks = {check["check"]: check["agrees"] for check in figures["checks"]}
    assert all(checks.values()), checks
    for rows in ("padded", "packed"):
        for way in ("eager, float32", "eager, bfloat16", "compile, bfloat16"):
            assert f"{rows}, {way} against float32 on the CPU" in checks
    assert "fp16 overflow" in checks
    assert "run: resumed from its checkpoint" in checks


@pytest.mark.slow
def test_every_side_is_timed_and_keeps_its_repeats(figures) -> None:
    cells = {(entry["side"], entry["rows"]) for entry in figures["speeds"] if entry["model"] == "large"}
    sides = {"ours", "ours, eager", "ours, ZeRO 1", "bare loop", "bare loop, eager", "Hugging Face"}
    assert {(side, "full") for side in sides} | {("ours", "packed"), ("Hugging Face", "padded")} <= cells
    for entry in figures["speeds"]:
        assert len(entry["step_seconds"]) == len(entry["peak_tflops"]) >= 2
        assert entry["sequences_per_second"] > 0


def test_a_gpu_is_asked_for_outside_the_self_check() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "there is no GPU; on a CPU try --self-check"


def test_drawn_rows_are_as_long_as_those_of_english_wikipedia() -> None:
    source = RowSource(vocab_size=30522, max_seq_length=128, max_predictions_per_seq=20)
    rows = source.realistic_rows(20_000, np.random.default_rng(0))
    tokens = rows.sizes.tokens
    assert tokens.mean() == pytest.approx(97, abs=1)
    assert tokens.std() == pytest.approx(29, abs=1)
    assert (tokens == 128).mean() == pytest.approx(0.03, abs=0.01)
    assert rows.sizes.predictions.sum() == pytest.approx(0.15 * (tokens - 2).sum(), rel=0.01)


@pytest.mark.parametrize("kind", ["full_rows", "realistic_rows"])
def test_rows_are_never_zeros_and_mask_nothing_but_their_own_tokens(kind) -> None:
    rows = getattr(SMALL, kind)(500, np.random.default_rng(0))
    column = np.arange(32)
    inside = column < rows.sequence_length[:, None]
    assert ((rows.input_ids > 0) == inside).all()
    used = rows.masked_lm_ids > 0
    assert ((rows.masked_lm_positions > 0) == used).all()
    assert (rows.masked_lm_positions < rows.sequence_length[:, None] - 1).all()
    for positions, slots in zip(rows.masked_lm_positions, used, strict=True):
        assert len(set(positions[slots])) == slots.sum() >= 1


def test_hugging_faces_side_has_the_same_loss_on_the_same_weights() -> None:
    hardware = Hardware(Processes(0, 1, CPU, None, None), str(DS_CONFIGS / "cpu.json"))
    config = ModelConfig("bert-tiny", "post_ln", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLanguageModel(resolve(config, 200, 32, pad_token_id=0))
    batch = to_batch(SMALL.realistic_rows(8, np.random.default_rng(0)), SMALL.padded_shape(8), CPU)
    (micro_batch,) = batch.micro_batches
    ours = InBareLoop(model, hardware)._share_of_loss(micro_batch, batch)
    theirs = HuggingFace(to_hugging_face(model), hardware)._share_of_loss(micro_batch, batch)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)


def test_a_dense_head_has_a_prediction_for_every_position_but_the_first() -> None:
    batch = to_batch(SMALL.full_rows(4, np.random.default_rng(0)), SMALL.padded_shape(4), CPU)
    (micro_batch,) = with_dense_head(batch).micro_batches
    ids, _, positions, labels, _ = micro_batch.model_inputs(CPU)
    assert positions.tolist() == list(range(4 * 32))
    assert labels[1:].tolist() == ids.flatten()[1:].tolist()  # position 0 means that a slot is not used


def test_too_little_memory_or_a_missing_package_is_no_failure_and_anything_else_is() -> None:
    attempts = Attempts()

    def fail(error: Exception) -> None:
        raise error

    assert attempts.of("fits", lambda: 1) == 1
    assert attempts.of("large", lambda: fail(torch.OutOfMemoryError("no room"))) is None
    assert attempts.of("apex", lambda: fail(UserError("apex is not here"))) is None
    assert attempts.of("wrong", lambda: fail(ValueError("a bug\nand more"))) is None
    assert attempts.failures == ["wrong"]
    assert attempts.outcomes == {"large": "out of memory", "apex": "apex is not here", "wrong": "ValueError: a bug"}
