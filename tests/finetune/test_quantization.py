"""The int8 form against integers computed by hand and against transformers' own loading; what changes is measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.errors import UserError
from finetune import quantize as quantize_module
from finetune.classifier import load_classifier
from finetune.heads import remove_heads, write_pruned_heads
from finetune.model import Encoder
from finetune.model_record import read_record
from finetune.predictor import Predictor
from finetune.quantization import num_int8_weights, quantize
from finetune.quantize import quantize_model, statement
from tests.finetune.tuned_models import make_model

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["the cat was good", "the film was awful and the book was dull", "a lovely river"]


@pytest.fixture(scope="module")
def tuned(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tuned"), model_folder, ["bad", "good"], "sst2", hidden_size=64)


@pytest.fixture(scope="module")
def quantized(tuned: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "Q"
    quantize_model(str(tuned), folder, glue_dir, compiled=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def little_timing_on_one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "_REPETITIONS", range(2, 3))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(classifier: torch.nn.Module, tokenizer_folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(tokenizer_folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return classifier.eval()(**inputs).logits


def to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers from -128 to 127 and the scale of each row, the largest magnitude of the row being the last step."""
    scales = rows.abs().amax(dim=-1, keepdim=True) / 127.5
    return (rows * (1 / scales)).round().clamp(-128, 127).double(), scales.double()


def test_linear_layers_compute_with_integers_and_a_scale_of_each_row(tuned: Path):
    weight = stored(tuned)["bert.encoder.layer.0.intermediate.dense.weight"]
    bias = stored(tuned)["bert.encoder.layer.0.intermediate.dense.bias"].double()
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    (weights, weight_scales), (activations, scales) = to_int8(weight), to_int8(inputs)
    expected = (activations @ weights.T) * scales * weight_scales.T + bias
    layer = quantize(tuned).bert.encoder.layer[0].intermediate.dense
    with torch.inference_mode():
        output = layer(inputs).double()
    assert torch.allclose(output, expected, atol=1e-4)
    assert not torch.allclose(output, (inputs @ weight.T + bias), atol=1e-3)


def test_linear_weights_are_stored_as_int8_and_everything_else_as_float32(tuned: Path, quantized: Path):
    before, after = stored(tuned), stored(quantized)
    linear = [name for name, module in load_classifier(tuned).named_modules() if isinstance(module, torch.nn.Linear)]
    integers = sum(tensor.numel() for name, tensor in after.items() if name.endswith("_weight_qdata"))
    assert integers == sum(before[f"{name}.weight"].numel() for name in linear)
    assert {after[name].dtype for name in after if name.endswith("_weight_qdata")} == {torch.int8}
    others = [name for name in before if name.removesuffix(".weight") not in linear]
    assert any("embeddings" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tuned, quantized)]
    assert sizes[0] - sizes[1] > 2 * integers
    assert num_int8_weights(load_classifier(quantized)) == integers
    assert num_int8_weights(load_classifier(tuned)) == 0


def test_outputs_are_nearly_the_float32_models_and_not_the_same(tuned: Path, quantized: Path):
    before, after = (logits(load_classifier(folder), tuned) for folder in (tuned, quantized))
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 0.1 * before.abs().max()


def test_transformers_alone_loads_the_same_model(quantized: Path):
    theirs = AutoModelForSequenceClassification.from_pretrained(quantized)
    assert torch.equal(logits(theirs, quantized), logits(load_classifier(quantized), quantized))
    assert Predictor(quantized).labels == ("bad", "good")


def test_the_folder_tells_what_was_measured_before_and_after(tuned: Path, quantized: Path, glue_dir: Path):
    results = json.loads((quantized / "results.json").read_text())
    rows = [line.split("\t") for line in (glue_dir / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    for name, folder in (("float32", tuned), ("int8", quantized)):
        predictor = Predictor(folder)
        right = [predictor.logits(([text],)).argmax() == int(label) for text, label in rows]
        assert results[name]["metrics"] == {"dev": {"accuracy": sum(right) / len(right)}}
        assert results[name]["file_bytes"] == (folder / "model.safetensors").stat().st_size
        assert all(seconds > 0 for seconds in results[name]["seconds"]["eager"].values())
    assert [*results["int8"]["seconds"]["eager"]] == ["1", "32"]
    assert results["threads"] == torch.get_num_threads()
    record = read_record(quantized)
    assert (record.task_name, record.base_model) == ("sst2", "run/hf")
    assert record.metrics == results["int8"]["metrics"]
    report = (quantized / "report.md").read_text()
    assert report.splitlines()[2] == statement(results)
    assert "| of them int8 | 0 |" in report
    assert {path.name for path in quantized.iterdir() if not path.name.startswith(".")} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "finetuning.json"),
        *("config.yaml", "provenance.json", "results.json", "report.md", "report.html", "quantization.png"),
    }


def made_results(eager: float, compiled: float) -> dict[str, Any]:
    """Of a model whose int8 form takes so many times the time."""

    def of(factors: tuple[float, float], score: float, file_bytes: int, int8_weights: int) -> dict[str, Any]:
        seconds = {
            mode: {"1": factor * 0.01, "32": factor * 0.1}
            for mode, factor in zip(("eager", "compiled"), factors, strict=True)
        }
        metrics = {"dev": {"f1": score}}
        return {
            "metrics": metrics,
            "file_bytes": file_bytes,
            "parameters": 1000,
            "int8_weights": int8_weights,
            "seconds": seconds,
        }

    return {
        "task": {"name": "mrpc", "title": "MRPC", "metrics": ["f1"]},
        "rows": {"dev": 408},
        "float32": of((1.0, 1.0), 0.9, 4_000_000, 0),
        "int8": of((eager, compiled), 0.89, 2_500_000, 750),
    }


@pytest.mark.parametrize(
    ("eager", "compiled", "first_words"),
    [
        (1.5, 1.0, "int8 is not faster than float32 here: eager at batch 1 (0.67 times as fast), "),
        (1.5, 0.5, "int8 is faster than float32 here compiled at batch 1 (2.00 times as fast), "),
        (0.5, 0.5, "int8 is faster than float32 here eager at batch 1 (2.00 times as fast), "),
    ],
)
def test_the_report_begins_with_whether_it_is_faster(eager: float, compiled: float, first_words: str):
    text = statement(made_results(eager, compiled))
    assert text.startswith(first_words)
    assert ("not faster" in text) == (max(eager, compiled) >= 1.0)
    assert "89.00 instead of 90.00" in text
    assert "2.5 instead of 4.0 MB: 25% of the parameters" in text


def test_the_same_command_again_renews_the_folder_and_another_model_is_refused(
    tuned: Path, quantized: Path, glue_dir: Path, tmp_path: Path, model_folder: Path
):
    folder, weights = Path(shutil.copytree(quantized, tmp_path / "Q")), stored(quantized)
    (folder / "config.json").unlink()  # as a kill just before the end leaves it
    quantize_model(str(tuned), folder, glue_dir, compiled=False)
    again = stored(folder)
    assert [*again] == [*weights]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert load_classifier(folder).config.quantization_config
    other = make_model(tmp_path / "other", model_folder, ["bad", "good"], "sst2")
    with pytest.raises(UserError, match="was made with another configuration"):
        quantize_model(str(other), folder, glue_dir, compiled=False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored(folder).items())


def pruned(tuned: Path, folder: Path) -> Path:
    classifier = load_classifier(tuned)
    remove_heads(classifier, {0: [1]})
    classifier.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(folder)
    write_pruned_heads(folder, classifier)
    return folder


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(
    tuned: Path, quantized: Path, model_folder: Path, glue_dir: Path, tmp_path: Path
):
    without_record = make_model(tmp_path / "plain", model_folder, ["bad", "good"])
    three = make_model(tmp_path / "three", model_folder, ["a", "b", "c"])
    refused = {
        "is quantised already": (quantized, None),
        "make its full-size form": (pruned(tuned, tmp_path / "pruned"), None),
        "has no record of its task: give --task_name": (without_record, None),
        "there is no task 'sst'": (without_record, "sst"),
        "was tuned for sst2": (tuned, "cola"),
        "has 3 outputs: it is not SST-2's": (three, "sst2"),
        "it is no classifier before it is fine-tuned": (model_folder, "sst2"),
    }
    for message, (folder, task_name) in refused.items():
        with pytest.raises(UserError, match=message):
            quantize_model(str(folder), tmp_path / "Q", glue_dir, task_name)
        assert not (tmp_path / "Q").exists()
    with pytest.raises(UserError, match=r"dev\.tsv does not exist"):
        quantize_model(str(tuned), tmp_path / "Q", tmp_path)
    with pytest.raises(UserError, match="is not empty and not ours"):
        quantize_model(str(tuned), model_folder, glue_dir)
    assert not (tmp_path / "Q").exists()


def test_without_torchao_both_steps_say_so(
    tuned: Path, quantized: Path, glue_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for step in (lambda: load_classifier(quantized), lambda: quantize_model(str(tuned), tmp_path / "Q", glue_dir)):
        with pytest.raises(UserError, match="need torchao, which is not installed: pip install"):
            step()
    assert not (tmp_path / "Q").exists()


def test_integers_are_not_trained_on(quantized: Path):
    with pytest.raises(UserError, match="is quantised"):
        Encoder(quantized)


def test_a_compiler_that_does_not_work_is_told_in_a_line(
    tuned: Path, glue_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr("torch.compile", lambda model, **_: fails)
    with pytest.raises(UserError, match=r"no C\+\+ compiler.*add --no_compile"):
        quantize_model(str(tuned), tmp_path / "Q", glue_dir)
    assert not (tmp_path / "Q" / "config.json").exists()


@pytest.mark.slow
def test_compiled_models_are_timed_and_commands_print_nothing_else(tuned: Path, glue_dir: Path, tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "finetune", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("quantize", "--model", str(tuned), "--output_dir", "Q", "--glue_dir", str(glue_dir))
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "Q" / "results.json").read_text())
    assert all(results[name]["seconds"]["compiled"]["32"] > 0 for name in ("float32", "int8"))
    predicted = run("predict", "Q", "the cat was good")
    assert (predicted.returncode, predicted.stderr) == (0, "")
    assert "| the cat was good |" in predicted.stdout
    refused = run("predict", "Q", "the cat was good | a road")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
