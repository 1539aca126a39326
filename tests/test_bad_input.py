"""What users get wrong ends in one clear line and exit code 2, and nothing of theirs is written over."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import tokenizers
import torch.distributed as dist

import run_pretraining
from common import cli
from data_prep import __main__ as data_prep_commands

TEXT_SOURCE = '[{"kind": "text", "path": "%s"}]'


@pytest.fixture(autouse=True)
def a_process_of_its_own() -> Iterator[None]:
    """A command that is refused leaves what binds it to the others to the end of its process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def fails_with(capsys, monkeypatch, arguments: list[str], *expected: str) -> None:
    """Run a command line in this process; expect exit code 2 and one line with these words."""
    program, *rest = arguments
    monkeypatch.setattr(sys, "argv", arguments)
    command = (
        run_pretraining.main if program == "run_pretraining.py" else lambda: data_prep_commands.COMMANDS[program](rest)
    )
    # A run without a launcher describes itself in the environment, which other tests must not inherit.
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as exit_info:
        cli.run(command)
    error = capsys.readouterr().err.strip()
    assert exit_info.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    for words in expected:
        assert words in error


def build_arguments(path: Path, output: Path, *more: str) -> list[str]:
    return ["build", "--sources", TEXT_SOURCE % path, "--tokenizer", "train", "--output_dir", str(output), *more]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "matches no file"), ({}, "holds no *.txt"), ({"a.txt": " \n\n \n"}, "holds no text")]
)
def test_text_that_is_not_there(content, words, tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "text"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    fails_with(capsys, monkeypatch, build_arguments(folder, tmp_path / "out"), str(folder), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--dupe_facto", "3"], "dupe_facto"),
        (["--dupe_factor", "three"], "dupe_factor"),
        (["--dupe_factor", "0"], "dupe_factor must be from 1"),
        (["--sources", '[{"kind": "txet"}]'], "kind"),
        (["--sources", '[{"kind": "text", "path": null}]'], "needs a path"),
        (["--sources", '[{"kind": "text", "path": "a", "rows_per_document": 0}]'], "rows_per_document"),
        (["--masked_lm_prob", "[0.1, 0.2]"], "one for each of the dupe_factor copies"),
        (["--masked_lm_prob", "1.5"], "masked_lm_prob must lie between 0 and 1"),
        (["--sentence_splitter", "nltk"], "sentence_splitter"),
        (["--executor", "dask"], "needs the address of its scheduler"),
        (["--tokenizer", "nowhere/vocab.txt"], "nowhere/vocab.txt"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--vocab_size", "-5"], "vocab_size"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_data_options(option, words, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    fails_with(capsys, monkeypatch, build_arguments(tmp_path, tmp_path / "out", *option), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[PAD]\n[UNK]\n"])
@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_a_tokenizer_file_that_is_damaged(name, content, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.md").write_text("One document.\n\nAnother one.\n")
    (tmp_path / name).write_text(content)
    arguments = build_arguments(tmp_path / "a.md", tmp_path / "out", "--tokenizer", str(tmp_path / name))
    fails_with(capsys, monkeypatch, arguments, str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_the_second_of_two_sources_is_missing(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.md").write_text("One document.\n\nAnother one.\n")
    sources = [{"kind": "text", "path": str(tmp_path / name)} for name in ("a.md", "b.md")]
    arguments = [
        "build",
        "--sources",
        json.dumps(sources),
        "--tokenizer",
        "train",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    fails_with(capsys, monkeypatch, arguments, "b.md")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    fails_with(capsys, monkeypatch, build_arguments(tmp_path, tmp_path / "a.txt"), "is a file")


def test_a_benchmark_is_not_written_into_a_folder_of_something_else(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "README.md").write_text("mine")
    fails_with(capsys, monkeypatch, ["demo_benchmark", "--output_dir", str(tmp_path)], "not ours")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_vocabulary_without_mask(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    vocabulary = tmp_path / "vocabulary.json"
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(vocabulary))
    arguments = build_arguments(tmp_path, tmp_path / "out", "--tokenizer", str(vocabulary))
    fails_with(capsys, monkeypatch, arguments, "mask_token")


def test_whole_words_need_a_tokenizer_that_marks_them(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]")).save(str(tmp_path / "words.json"))
    arguments = build_arguments(tmp_path, tmp_path / "out", "--tokenizer", str(tmp_path / "words.json"))
    fails_with(capsys, monkeypatch, [*arguments, "--whole_word_masking", "true"], "marks where words begin")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "file", "words"),
    [
        ("wikipedia_xml", "a.xml", "not a MediaWiki XML dump"),
        ("wikiextractor", "wiki_00", "holds no text"),
        ("jsonl", "a.jsonl", "set 'field'"),
        ("parquet", "a.parquet", "can't read"),
    ],
)
def test_a_file_of_another_kind(kind, file, words, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / file).write_text("Plain text.\n\nNothing else.\n")
    sources = json.dumps([{"kind": kind, "path": str(tmp_path / file)}])
    arguments = ["build", "--sources", sources, "--tokenizer", "train", "--output_dir", str(tmp_path / "out")]
    fails_with(capsys, monkeypatch, arguments, file, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--num_gpus", "0"], "above 0"), (["--sources", TEXT_SOURCE % "nowhere"], "nowhere"), (["--gpus", "8"], "gpus")],
)
def test_plan_options(option, words, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    arguments = ["plan", "--sources", TEXT_SOURCE % tmp_path, "--tokenizer", "train", *option]
    fails_with(capsys, monkeypatch, arguments, words)


def test_a_tokenizer_folder_of_another_configuration(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    arguments = ["train_tokenizer", "--sources", TEXT_SOURCE % tmp_path, "--output_dir", str(tmp_path / "out")]
    data_prep_commands.COMMANDS["train_tokenizer"]([*arguments[1:], "--vocab_size", "100"])
    data_prep_commands.COMMANDS["train_tokenizer"]([*arguments[1:], "--vocab_size", "100"])  # there already
    capsys.readouterr()
    fails_with(capsys, monkeypatch, [*arguments, "--vocab_size", "200"], "vocab_size: 100 there, 200 now")


def test_an_output_folder_of_something_else(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("One document.\n\nAnother one.\n")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    fails_with(capsys, monkeypatch, build_arguments(tmp_path, mine), str(mine), "not ours")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_data_folder_of_another_configuration(data_dir, capsys, monkeypatch) -> None:
    arguments = [
        "build",
        "--config",
        str(data_dir / "config.yaml"),
        "--output_dir",
        str(data_dir),
        "--dupe_factor",
        "7",
    ]
    fails_with(capsys, monkeypatch, arguments, "dupe_factor: 5 there, 7 now")


def pretrain_arguments(data_dir: Path, output: Path, *more: str) -> list[str]:
    return ["run_pretraining.py", "--data_dir", str(data_dir), "--output_dir", str(output), *more]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--time_budget", "soon"], "duration"),
        (["--max_steps", "5"], "either time_budget or max_steps"),
        (["--schedule_length", "1h"], "shorter than time_budget"),
        (["--model.preset", "bert-huge"], "model.preset"),
        (["--model.num_attention_heads", "7"], "not divisible by num_attention_heads"),
        (["--model.max_position_embeddings", "32"], "max_position_embeddings"),
        (["--learning_rate", "1e-3"], "learning_rate"),
        (["--optimizer.learning_rate", "-1"], "learning_rate"),
        (["--model.num_hidden_layers", "0"], "num_hidden_layers"),
        (["--model.hidden_dropout_prob", "2"], "hidden_dropout_prob"),
        (["--validation_interval", "200%"], "at most 100"),
        (["--seed", "-1"], "seed"),
        (["--warmup_proportion", "6"], "warmup_proportion"),
        (["--ds_config", "nowhere.json"], "nowhere.json"),
        (["--resume", "nowhere"], "nowhere"),
        (["--gradient_clipping", "-1"], "gradient_clipping must be at least 0"),
        (["--train_batch_size", "1000000000000"], "train_batch_size must be at most"),
        (["--init_from", "configs"], "no config.json"),
        (["--init_from", "configs", "--resume", "nowhere"], "give one of them"),
        (["--optimizer.name", "lion"], "optimizer.name"),
        (
            ["--optimizer.name", "lamb", "--ds_config", "ds_configs/bf16_zero1.json"],
            "optimizer lamb needs whole float32",
        ),
        (["--kernels", "apex"], "kernels apex need an NVIDIA GPU"),
        (["--kernels", "deepspeed"], "kernels deepspeed need an NVIDIA GPU"),
        (["--train_batch_size", "100", "--micro_batch_size", "8"], "train_batch_size 100 is not divisible"),
    ],
)
def test_pretraining_options(option, words, data_dir, tmp_path, capsys, monkeypatch) -> None:
    fails_with(capsys, monkeypatch, pretrain_arguments(data_dir, tmp_path / "run", *option), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"train_batch_size": 8}', ["sets train_batch_size"]),
        ("[]", ["not a JSON object"]),
        ("{", ["not JSON"]),
        ('{"zero_optimisation": {"stage": 1}}', ["zero_optimisation, which is not one of"]),
        ('{"zero_optimization": true}', ["must be an object"]),
        ('{"zero_optimization": {"stage": 2}}', ["ZeRO stage 2", "only 0 and 1"]),
        ('{"zero_optimization": {"stage": "1"}}', ['ZeRO stage "1"']),
        ('{"zero_optimization": {"overlap_comm": true}}', ["zero_optimization.overlap_comm"]),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": "much"}}',
            ["DeepSpeed refuses", "reduce_bucket_size"],
        ),
        ('{"torch_autocast": {"enabled": true}}', ["torch_autocast.dtype null"]),
        ('{"torch_autocast": {"enabled": true, "dtype": "float64"}}', ["bfloat16, float16"]),
        ('{"bf16": {"enabled": true}}', ["bf16 weights at ZeRO stage 0", "torch_autocast"]),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', ["bf16 and fp16", "one of them"]),
        ('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}}', ["fp16 weights, which need a GPU"]),
    ],
)
def test_ds_configs(content, words, data_dir, tmp_path, capsys, monkeypatch) -> None:
    file, run = tmp_path / "ds.json", tmp_path / "run"
    file.write_text(content)
    tiny = ["--model.preset", "bert-tiny", "--micro_batch_size", "8", "--train_batch_size", "8"]
    fails_with(capsys, monkeypatch, pretrain_arguments(data_dir, run, "--ds_config", str(file), *tiny), *words)


@pytest.fixture
def copied_data(data_dir, tmp_path) -> Path:
    return Path(shutil.copytree(data_dir, tmp_path / "copied"))


def change_manifest(data: Path, name: str, value: int) -> None:
    content = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**content, name: value}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: shutil.rmtree(data), ["data folder", "does not exist"]),
        (lambda data: (data / "manifest.json").unlink(), ["manifest.json", "not complete"]),
        (lambda data: (data / "manifest.json").write_text("{"), ["manifest.json", "damaged"]),
        (lambda data: (data / "manifest.json").write_text("{}"), ["not a manifest of ours"]),
        (lambda data: (data / "train-00001.h5").unlink(), ["train-00001.h5", "missing"]),
        (lambda data: (data / "train-00001.h5").write_bytes(b"not HDF5"), ["train-00001.h5", "damaged"]),
        (
            lambda data: shutil.copy(data / "validation-00000.h5", data / "train-00001.h5"),
            ["train-00001.h5", "rows, the manifest says"],
        ),
        (lambda data: change_manifest(data, "max_seq_length", 128), ["rows of 64 tokens", "the manifest says 128"]),
        (
            lambda data: change_manifest(data, "max_predictions_per_seq", 5),
            ["the manifest says 64 and 5"],
        ),
        (
            lambda data: (data / "tokenizer" / "tokenizer.json").write_text("{}"),
            ["tokenizer.json", "not the tokenizer"],
        ),
    ],
)
def test_a_data_folder_that_is_damaged(damage, words, copied_data, tmp_path, capsys, monkeypatch) -> None:
    damage(copied_data)
    fails_with(capsys, monkeypatch, pretrain_arguments(copied_data, tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_command_that_does_not_exist(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["data_prep", "biuld"])
    with pytest.raises(SystemExit) as exit_info:
        cli.run_subcommand("python -m data_prep", "", data_prep_commands.COMMANDS)
    assert exit_info.value.code == 2
    assert "biuld" in capsys.readouterr().err
