"""A checkpoint, with nothing else at hand, becomes a model folder that transformers loads: whole, or not at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from common import cli
from data_prep.shards import Manifest, read_manifest
from pretrain import __main__ as commands
from pretrain import export as export_module
from pretrain.architecture import Architecture, ModelConfig, resolve
from pretrain.checkpoint import Checkpoints, Setting, TrainState
from pretrain.export import export
from pretrain.hugging_face import to_hugging_face
from pretrain.init_from import load_pretrained, resolve_from
from pretrain.model import MaskedLanguageModel
from pretrain.model_card import data_facts, software_facts

REPOSITORY = Path(__file__).parents[2]


class FilesOnly:
    """What a DeepSpeed engine at stage 0 leaves in a checkpoint, without the engine."""

    processes = SimpleNamespace(barrier=lambda: None)

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        torch.save({"module": self._weights}, folder / tag / "mp_rank_00_model_states.pt")


@pytest.fixture(scope="module")
def manifest(data_dir) -> Manifest:
    return read_manifest(data_dir)


def record_of(manifest: Manifest) -> dict[str, Any]:
    """As a run writes it."""
    return {
        "elapsed_seconds": 7199.5,
        "time_budget_seconds": 7200.0,
        "stopped_by": "time_budget",
        "steps": 12345,
        "sequences": 50565120,
        "epochs": 1.25,
        "train_batch_size": 4096,
        "hardware": "8 x NVIDIA H200",
        "training": {
            "optimizer": {"name": "adamw", "learning_rate": 0.002},
            "warmup_proportion": 0.06,
            "init_from": None,
        },
        "data": data_facts(manifest),
        "software": software_facts(),
        "train": [{"step": 12340, "elapsed_seconds": 7190.0, "loss": 1.6543, "learning_rate": 0.0}],
        "validation": [{"step": 12345, "elapsed_seconds": 7199.5, "loss": 1.7654}],
    }


def save_checkpoint(
    output_dir: Path, manifest: Manifest, weights: dict[str, torch.Tensor], architecture: Architecture, step: int = 5
) -> Path:
    setting = Setting(manifest.sha256, asdict(architecture), "adamw", zero_stage=0, world_size=1)
    state = TrainState(step, 40, 0, {"training": 7199.5}, 4, {}, None, {}, None, setting)
    checkpoints = Checkpoints(output_dir, manifest.tokenizer_folder, keep=2, rank=0)
    checkpoints.save(FilesOnly(weights), step, lambda: state, record_of(manifest))
    newest = checkpoints.latest()
    assert newest is not None
    return newest


def new_model(manifest: Manifest, layer_norm: str = "pre_ln", seed: int = 0) -> MaskedLanguageModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        preset="bert-tiny", hidden_size=32, num_attention_heads=4, layer_norm=layer_norm, max_position_embeddings=80
    )
    return MaskedLanguageModel(resolve(config, manifest.vocab_size, 64, manifest.pad_token_id))


@pytest.fixture
def model(manifest) -> MaskedLanguageModel:
    return new_model(manifest)


@pytest.fixture
def checkpoint(model, manifest, tmp_path) -> Path:
    return save_checkpoint(tmp_path / "run", manifest, model.state_dict(), model.architecture)


@pytest.fixture
def exported(checkpoint, tmp_path) -> Path:
    export(checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


def run(*arguments: Path | str) -> None:
    cli.run(lambda: commands.COMMANDS["export"]([str(argument) for argument in arguments]))


def refused(capsys, *arguments: Path | str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    error = capsys.readouterr().err.strip()
    assert exit_info.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_whole_and_has_the_weights(exported, model, manifest) -> None:
    loaded, report = AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in to_hugging_face(model).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.get_input_embeddings().weight.shape[0] == manifest.vocab_size
    files = {"config.json", "model.safetensors", "pretraining.json", "README.md"}
    assert set(contents(exported)) == files | {path.name for path in manifest.tokenizer_folder.iterdir()}
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "a file that others can't read"


def test_fill_mask(exported) -> None:
    filled = pipeline("fill-mask", model=str(exported))("The old sailor saw a heron by the [MASK].")
    assert len(filled) == 5
    assert AutoTokenizer.from_pretrained(exported).mask_token == "[MASK]"


def test_the_checkpoint_is_all_it_needs(checkpoint, model, tmp_path, monkeypatch) -> None:
    """Away from the run and its data, the same bytes; and without DeepSpeed."""
    export(checkpoint, tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(checkpoint, tmp_path / "elsewhere" / "taken")
    shutil.rmtree(tmp_path / "run")
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path; from pretrain.export import export\n"
        "export(Path('taken'), Path('there'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "elsewhere" / "there") == contents(tmp_path / "here")


def test_names_and_types_of_weights_make_no_difference(exported, model, manifest, tmp_path) -> None:
    """Compiled as a whole or layer by layer; and in bfloat16, the rounded weights."""
    for name, change in {
        "whole": lambda key: f"_orig_mod.{key}",
        "layers": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    }.items():
        weights = {change(key): tensor for key, tensor in model.state_dict().items()}
        export(save_checkpoint(tmp_path / name, manifest, weights, model.architecture), tmp_path / f"hf-{name}")
        assert contents(tmp_path / f"hf-{name}") == contents(exported)
    rounded = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    export(save_checkpoint(tmp_path / "bf16", manifest, rounded, model.architecture), tmp_path / "hf-bf16")
    for key, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "hf-bf16" / "model.safetensors")[key], tensor.bfloat16().float())


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_export_to_init_from_to_export_changes_no_bit(layer_norm, manifest, tmp_path) -> None:
    model = new_model(manifest, layer_norm)
    export(save_checkpoint(tmp_path / "first", manifest, model.state_dict(), model.architecture), tmp_path / "hf")
    again = MaskedLanguageModel(resolve_from(str(tmp_path / "hf"), manifest, ModelConfig()))
    load_pretrained(again, str(tmp_path / "hf"))
    assert again.architecture == model.architecture
    export(save_checkpoint(tmp_path / "second", manifest, again.state_dict(), again.architecture), tmp_path / "hf2")
    assert contents(tmp_path / "hf2") == contents(tmp_path / "hf")


def test_a_folder_of_hugging_face_comes_back_with_identical_tensors(manifest, tmp_path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=800, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "theirs")
    model = MaskedLanguageModel(resolve_from(str(tmp_path / "theirs"), manifest, ModelConfig()))
    load_pretrained(model, str(tmp_path / "theirs"))
    export(save_checkpoint(tmp_path / "run", manifest, model.state_dict(), model.architecture), tmp_path / "hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "hf"))
    assert before == after


def test_the_card_tells_what_the_record_tells(exported, manifest) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    _, front_matter, card = text.split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "fill-mask"
    assert metadata["mask_token"] == "[MASK]"
    assert not {"license", "language"} & metadata.keys()
    lines = [line.strip("| ") for line in card.splitlines() if line.startswith("| ")]
    rows = dict(line.split(" | ", 1) for line in lines if " | " in line)
    assert rows["time budget"] == "7,200.0 s (2.0 h)"
    assert rows["hardware"] == "8 x NVIDIA H200"
    assert rows["sequences a step"] == "4,096"
    assert rows["optimizer"] == "adamw, learning_rate 0.002"
    assert rows["learning rate's warmup"] == "6 %"
    assert rows["layers"] == "2"
    assert rows["sources"] == "demo"
    assert rows["documents"] == f"{manifest.content['num_documents']:,}"
    assert rows["tokens to predict"] == "15 %"
    assert rows["SHA-256 of the manifest"] == manifest.sha256
    assert rows["torch"] == torch.__version__
    assert rows["training"] == "1.6543 | 12,340"
    assert rows["validation"] == "1.7654 | 12,345"
    assert "from random weights" in card
    assert "before its end" not in card
    assert "None" not in card


def test_the_card_leaves_out_what_is_not_known(checkpoint, tmp_path) -> None:
    (checkpoint / "pretraining.json").write_text('{"elapsed_seconds": 12.0}')
    export(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "Pretrained by masked language modelling" in card
    assert "before its end" in card
    assert not any(words in card for words in ("None", "budget", "## Loss", "## Data", "## Software", "hardware"))


def test_the_card_of_continued_pretraining(checkpoint, tmp_path) -> None:
    (checkpoint / "pretraining.json").write_text('{"training": {"init_from": "a/model"}}')
    export(checkpoint, tmp_path / "hf")
    assert "further from `a/model`" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_a_runs_folder_stands_for_its_newest_checkpoint(manifest, model, tmp_path, capsys) -> None:
    older = save_checkpoint(tmp_path / "run", manifest, new_model(manifest, seed=1).state_dict(), model.architecture, 1)
    newest = save_checkpoint(tmp_path / "run", manifest, model.state_dict(), model.architecture, 2)
    run(tmp_path / "run", tmp_path / "hf")
    assert str(newest) in capsys.readouterr().out
    run(older, tmp_path / "older")
    embeddings = "bert.embeddings.word_embeddings.weight"
    weights = load_file(tmp_path / "hf" / "model.safetensors")[embeddings]
    assert torch.equal(weights, model.state_dict()["embeddings.word.weight"][: manifest.vocab_size])
    assert not torch.equal(load_file(tmp_path / "older" / "model.safetensors")[embeddings], weights)


def test_the_record_of_the_newest_checkpoint_can_be_brought_up_to_date(checkpoint, manifest, tmp_path) -> None:
    Checkpoints(tmp_path / "run", manifest.tokenizer_folder, 2, 0).update_record({"elapsed_seconds": 99.0})
    export(checkpoint, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "pretraining.json").read_text()) == {"elapsed_seconds": 99.0}


def test_an_earlier_export_is_replaced(exported, manifest, tmp_path) -> None:
    other = new_model(manifest, seed=1)
    newer = save_checkpoint(tmp_path / "other", manifest, other.state_dict(), other.architecture)
    before = contents(exported)
    export(newer, exported)
    assert contents(exported)["model.safetensors"] != before["model.safetensors"]
    assert contents(exported).keys() == before.keys()


def test_an_export_that_fails_leaves_the_earlier_one(exported, checkpoint, monkeypatch) -> None:
    def full_disk(*_) -> None:
        raise OSError(28, "No space left on device")

    before = contents(exported)
    monkeypatch.setattr(export_module, "write_text", full_disk)
    with pytest.raises(SystemExit):
        run(checkpoint, exported)
    assert contents(exported) == before
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


def put_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def put_a_grid(folder: Path) -> None:
    """A grid's folder has the record, too."""
    folder.mkdir()
    (folder / "pretraining.json").write_text("{}")
    (folder / "results.json").write_text("{}")


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (put_a_file, "thesis.txt"),
        (put_a_grid, "results.json"),
        (lambda folder: folder.write_text("mine"), "is a file"),
        (lambda folder: (folder / "README.md").mkdir(parents=True), "not an earlier export"),
    ],
)
def test_nothing_else_is_written_over(put, words, checkpoint, tmp_path, capsys) -> None:
    target = tmp_path / "target"
    put(target)
    before = sorted(str(path) for path in target.rglob("*"))
    assert words in refused(capsys, checkpoint, target)
    assert sorted(str(path) for path in target.rglob("*")) == before


def test_an_export_with_something_of_the_users_in_it(exported, checkpoint, capsys) -> None:
    (exported / "notes.md").write_text("mine")
    assert "notes.md" in refused(capsys, checkpoint, exported)
    assert (exported / "notes.md").read_text() == "mine"


def test_a_checkpoint_is_not_written_over(checkpoint, capsys) -> None:
    before = contents(checkpoint / "tokenizer")
    assert "no part of an earlier export" in refused(capsys, checkpoint, checkpoint)
    assert contents(checkpoint / "tokenizer") == before


def change_state(checkpoint: Path, **architecture: Any) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    state["setting"]["architecture"].update(architecture)
    (checkpoint / "state.json").write_text(json.dumps(state))


def not_finite(checkpoint: Path) -> None:
    file = checkpoint / "mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=True)
    saved["module"]["head.dense.bias"][3] = torch.inf
    torch.save(saved, file)


DAMAGE = {
    "nothing": (shutil.rmtree, "does not exist"),
    "no state": (lambda c: (c / "state.json").unlink(), "no checkpoint"),
    "state cut": (lambda c: (c / "state.json").write_text('{"step": 5'), "state.json is damaged"),
    "state of something else": (lambda c: (c / "state.json").write_text("[]"), "not a checkpoint of ours"),
    "no record": (lambda c: (c / "pretraining.json").unlink(), "pretraining.json does not exist"),
    "record of something else": (lambda c: (c / "pretraining.json").write_text("[]"), "not a checkpoint of ours"),
    "no tokenizer": (lambda c: shutil.rmtree(c / "tokenizer"), "tokenizer/tokenizer.json"),
    "tokenizer cut": (lambda c: (c / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer"),
    "no weights": (lambda c: (c / "mp_rank_00_model_states.pt").unlink(), "not whole"),
    "weights cut": (lambda c: (c / "mp_rank_00_model_states.pt").write_bytes(b"PK"), "damaged"),
    "other sizes": (lambda c: change_state(c, hidden_size=64), "not those of its architecture"),
    "other layers": (lambda c: change_state(c, num_hidden_layers=1), "not those of its architecture"),
    "unknown sizes": (lambda c: change_state(c, num_experts=8), "not those of its architecture"),
    "infinite": (not_finite, "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_damaged(damage, checkpoint, tmp_path, capsys) -> None:
    change, words = DAMAGE[damage]
    change(checkpoint)
    assert words in refused(capsys, checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_is_neither_checkpoint_nor_run(tmp_path, capsys) -> None:
    assert "no checkpoint" in refused(capsys, tmp_path, tmp_path / "hf")


def test_arguments(capsys, tmp_path) -> None:
    assert "folder" in refused(capsys, tmp_path)
    assert "step" in refused(capsys, tmp_path, tmp_path / "hf", "--step", "3")
