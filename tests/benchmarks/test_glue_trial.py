"""The fine-tuning benchmarks: the sides do the same work, and what is compared is what is said."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import glue_trial, gpu_grid
from benchmarks.glue_sides import (
    FineTuning,
    HuggingFace,
    Ours,
    Outcome,
    load_rows,
    make_random_model,
    some_rows,
    standard_errors_apart,
)
from common.errors import UserError
from finetune.model import Encoder

WORDS = "the a cat dog saw ran big small red old house tree".split()
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def write(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoLA, RTE and STS-B, all of whose answers are in their first words, and a vocabulary."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write(folder / "bert-base-uncased" / "vocab.txt", [[word] for word in "[PAD] [UNK] [CLS] [SEP] [MASK]".split()])
    with (folder / "bert-base-uncased" / "vocab.txt").open("a") as file:
        file.writelines(f"{word}\n" for word in WORDS)
    sts_header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
    for split, size in (("train", 48), ("dev", 70)):
        texts = [" ".join(random.choice(WORDS, random.integers(3, 20))) for _ in range(size)]
        answers = [WORDS.index(text.split()[0]) for text in texts]
        write(
            folder / "glue/CoLA" / f"{split}.tsv",
            [["s", str(a % 2), "", t] for a, t in zip(answers, texts, strict=True)],
        )
        rte = [[t, t, "not_entailment" if a % 2 else "entailment"] for a, t in zip(answers, texts, strict=True)]
        write(folder / "glue/RTE" / f"{split}.tsv", [["sentence1", "sentence2", "label"], *rte])
        sts = [[*"0gfyoss", t, t, f"{a / 3:.3f}"] for a, t in zip(answers, texts, strict=True)]
        write(folder / "glue/STS-B" / f"{split}.tsv", [sts_header, *sts])
    return folder


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_random_model(folder, data / "bert-base-uncased" / "vocab.txt", **SMALL, **WITHOUT_DROPOUT)


@pytest.mark.slow
def test_all_sides_end_with_the_same_score_where_neither_order_nor_dropout_differs(data, model) -> None:
    rows, encoder = load_rows("stsb", data / "glue", model), Encoder(model)
    work = FineTuning("stsb", learning_rate=2e-3, batch_size=48, num_epochs=4, precision="fp32")
    sides = (Ours(), HuggingFace("max_length"), HuggingFace("longest"))
    scores = [side.run(work, 3, rows, encoder, CPU).score for side in sides]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-3)  # two rows change places where rounding differs
    other_precision = [side.run(replace(work, precision="bf16"), 3, rows, encoder, CPU).score for side in sides[::2]]
    assert other_precision == pytest.approx([other_precision[0]] * 2, abs=0.03)
    assert other_precision[0] != scores[0]


def test_chosen_rows_keep_their_tokens_and_labels(data, model) -> None:
    split = load_rows("rte", data / "glue", model)["train"]
    chosen = some_rows(split, np.array([5, 0, 41]))
    for place, origin in enumerate([5, 0, 41]):
        for name in ("input_ids", "token_type_ids"):
            ours = getattr(chosen, name)[chosen.offsets[place] : chosen.offsets[place + 1]]
            assert ours.tolist() == getattr(split, name)[split.offsets[origin] : split.offsets[origin + 1]].tolist()
        assert chosen.labels[place] == split.labels[origin]


def test_rows_for_speeds_are_of_all_lengths(data, model) -> None:
    rows = load_rows("cola", data / "glue", model)
    drawn = glue_trial.random_rows(rows, num_rows=48, seed=1)
    assert sorted(drawn["train"].lengths) == sorted(rows["train"].lengths)


def test_distance_of_means_is_welchs_statistic() -> None:
    ours, theirs = [0.5, 0.7, 0.55, 0.61], [0.4, 0.44, 0.41, 0.6, 0.39]
    assert standard_errors_apart(ours, theirs) == pytest.approx(
        stats.ttest_ind(ours, theirs, equal_var=False).statistic
    )


def test_a_kept_trial_is_not_run_again_and_other_settings_are(model, tmp_path) -> None:
    runs = []

    class Side:
        name = "ours"

        def run(self, work: FineTuning, seed: int, *_: object) -> Outcome:
            runs.append((work.num_epochs, seed))
            return Outcome(score=seed / 10, rows_per_second=1.0, seconds=1.0)

    work, encoder = FineTuning("cola", 1e-3, 8, 1, "fp32"), Encoder(model)
    for _ in range(2):
        trials = glue_trial.KeptTrials(tmp_path / "trials.json")
        assert trials.outcome(Side(), work, 1, {}, encoder).score == 0.1
        assert trials.outcome(Side(), work, 2, {}, encoder).score == 0.2
    trials.outcome(Side(), replace(work, num_epochs=2), 1, {}, encoder)
    assert runs == [(1, 1), (1, 2), (2, 1)]


@pytest.mark.slow
def test_the_program_prints_ratios_and_distances(data, model, tmp_path, monkeypatch, capsys) -> None:
    options = "--rounds 1 --rows 40 --seeds 2 --epochs 1".split()
    monkeypatch.setattr(sys, "argv", ["glue_trial.py", "--data", str(data), "--model", str(model), *options])
    glue_trial.main()
    output = capsys.readouterr().out.splitlines()
    figures = json.loads(output[-1])
    for task_name in ("cola", "rte"):
        for side in ("padded", "dynamic"):
            ratio = figures[f"ours_{task_name}_repeats"][0] / figures[f"{side}_{task_name}_repeats"][0]
            assert figures[f"vs_{side}_{task_name}"] == pytest.approx(ratio, rel=0.01)
        assert len(figures[f"ours_{task_name}_scores"]) == len(figures[f"dynamic_{task_name}_scores"]) == 2
    assert not any(line.startswith("{'") for line in output)  # the Trainer's own


def test_scores_of_an_untrained_model_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["glue_trial.py", "--only", "scores"])
    with pytest.raises(SystemExit):
        glue_trial.main()
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("an untrained model has no scores to compare: give --model")
    )


@pytest.mark.slow
def test_on_a_gpu_both_sides_take_turns_and_are_compared(data, model) -> None:
    place = gpu_grid.Place(data / "glue", model, "cpu")
    figures = gpu_grid.one_at_a_time(FineTuning("cola", 1e-3, 16, 1, "bf16"), place, seeds=range(1, 3))
    for kind in ("ours", "trainer", "untrained"):
        assert len(figures["grid_cola_scores"][kind]) == len(figures["grid_cola_seconds"][kind]) == 2
    seconds = figures["grid_cola_seconds"]
    ratios = [theirs / ours for theirs, ours in zip(seconds["trainer"], seconds["ours"], strict=True)]
    assert figures["grid_cola_vs_trainer"] == pytest.approx(sum(ratios) / 2, abs=1e-3)


@pytest.mark.slow
def test_several_processes_run_their_trials_at_the_same_time(data, model) -> None:
    place, work = gpu_grid.Place(data / "glue", model, "cpu"), FineTuning("cola", 1e-3, 16, 1, "bf16")
    figures = gpu_grid.several_at_once(work, place, seeds=range(1, 3), numbers=(1, 2))
    assert figures.keys() == {"grid_cola_trials_per_hour_of_1", "grid_cola_trials_per_hour_of_2"}
    assert all(rate > 0 for rate in figures.values())


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_instead_of_being_waited_for(data, model, tmp_path) -> None:
    place = gpu_grid.Place(tmp_path, model, "cpu")
    with pytest.raises(UserError, match="does not exist"):
        gpu_grid.seconds_of_processes(2, FineTuning("cola", 1e-3, 16, 1, "bf16"), place, seeds=[1])
