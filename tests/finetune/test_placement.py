from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.examples import read_split
from finetune.placement import Measurement, Probe, choose_number, devices, run_probes, threads_per_worker
from finetune.ranks import Ranks
from finetune.tasks import TASKS
from finetune.tokens import tokenize_split
from finetune.trial import Cell, Protocol

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_the_number_with_the_highest_throughput_is_chosen():
    rates = {1: 100.0, 2: 180.0, 3: 240.0, 4: 250.0, 6: 400.0}  # 4 gains less than 5 %, so 6 is not tried
    assert choose_number(lambda number: Measurement(rates[number], 0.05 * number)) == 3


def test_no_number_is_tried_whose_memory_would_not_fit():
    tried = []

    def measure(number: int) -> Measurement:
        tried.append(number)
        return Measurement(100.0 * number, 0.3 * number)

    assert choose_number(measure) == 3
    assert tried == [1, 2, 3]


def test_a_number_that_fails_is_not_chosen():
    assert choose_number(lambda number: Measurement(100.0 * number, 0.0) if number < 3 else None) == 2
    assert choose_number(lambda number: None) == 1


def test_the_threads_of_a_folders_first_start_stay(tmp_path: Path):
    first = threads_per_worker(1, tmp_path, ALONE)
    assert threads_per_worker(1000, tmp_path, ALONE) == first


def test_without_a_gpu_all_workers_are_on_the_cpu():
    assert devices(trials_per_gpu=4, num_workers=2, ranks=ALONE) == ["cpu", "cpu"]


@pytest.mark.slow
def test_processes_that_train_at_once_are_measured_together(model_folder: Path, glue_dir: Path, tmp_path: Path):
    task, tokenizer = TASKS["sst2"], AutoTokenizer.from_pretrained(model_folder)
    train = tokenize_split(read_split(task, "train", glue_dir), task, tokenizer, "words", 32, tmp_path)
    cell, protocol = Cell("sst2", 1e-3, 8, 1, "pretrained", 1), Protocol(32, 0.1, 0.06)
    assert run_probes(Probe(model_folder, protocol, task, cell, train, "cpu"), 2).rows_per_second > 0
    assert run_probes(Probe(tmp_path / "nowhere", protocol, task, cell, train, "cpu"), 2) is None
