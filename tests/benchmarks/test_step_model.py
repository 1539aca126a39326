"""The step on paper: the page shows what the program computes, and the program counts as a real ring does."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import step_model

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_page_has_the_tables_that_the_program_computes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, table in step_model.tables().items():
        assert table in page, f"run benchmarks/step_model.py: docs/performance.md has another table of {name}"


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_an_all_reduce_sends_what_a_ring_of_gpus_sends(gpus) -> None:
    parts = 6
    gradients = np.random.default_rng(0).integers(0, 100, (gpus, gpus, parts))  # of a GPU, in a chunk for each GPU
    total, sent = gradients.sum(axis=0), np.zeros(gpus)
    for turn in range(2 * (gpus - 1)):  # first each chunk is summed along the ring, then its sum goes around
        chunks = [(gpu - turn) % gpus for gpu in range(gpus)]
        messages = [gradients[gpu, chunk].copy() for gpu, chunk in enumerate(chunks)]
        for gpu, (chunk, message) in enumerate(zip(chunks, messages, strict=True)):
            right = (gpu + 1) % gpus
            gradients[right, chunk] = message + (gradients[right, chunk] if turn < gpus - 1 else 0)
            sent[gpu] += message.size
    assert (gradients == total).all()
    assert (4 * sent == step_model.all_reduce_bytes(gpus * parts, gpus, bytes_per_gradient=4)).all()


def test_the_last_line_of_the_program_is_one_json_object(capsys) -> None:
    step_model.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"floor", "bert-large", "bert-base"}
