"""Predictions for texts and files against Hugging Face's own pipeline; what doesn't fit, in one line."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from common.errors import UserError
from finetune import __main__ as commands
from finetune import predictor as predictor_module
from finetune.predict import predict_file, predict_texts
from finetune.predictor import Predictor
from tests.finetune.tuned_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the cat was good", "the film was awful and the book was dull", "a lovely river", "stone"]
PAIRS = ["the dog was bad", "a road", "the tree was great and the lamp was fine", "the house"]


@pytest.fixture(scope="module")
def sentiment(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("sentiment"), model_folder, ["bad", "good"], "sst2")


@pytest.fixture(scope="module")
def entailment(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ["entailment", "neutral", "contradiction"]
    return make_model(tmp_path_factory.mktemp("entailment"), model_folder, labels, "mnli")


@pytest.fixture(scope="module")
def similarity(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("similarity"), model_folder, ["score"], "stsb")


@pytest.fixture(scope="module")
def unknown(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a record of its task."""
    return make_model(tmp_path_factory.mktemp("unknown"), model_folder, ["no", "yes"])


def by_pipeline(folder: Path, rows: list) -> list[dict[str, float]]:
    """Each row alone: the labels' probabilities; of a regression model its score."""
    classify = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    function = "none" if classify.model.config.num_labels == 1 else "softmax"
    return [
        {
            answer["label"]: answer["score"]
            for answer in classify([row], function_to_apply=function, truncation=True, max_length=12)[0]
        }
        for row in rows
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_a_files_rows_keep_their_columns_and_get_the_pipelines_probabilities(ending, entailment: Path, tmp_path: Path):
    rows = [
        {"id": f"{place}", "sentence1": text, "sentence2": pair}
        for place, (text, pair) in enumerate(zip(TEXTS, PAIRS, strict=True))
    ]
    source, target = write_rows(tmp_path / f"rows{ending}", rows), tmp_path / "new" / f"out{ending}"
    predict_file(Predictor(entailment), source, target, batch_size=3)
    expected = by_pipeline(entailment, [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows])
    found = read_rows(target)
    names = ["probability_entailment", "probability_neutral", "probability_contradiction"]
    assert [*found[0]] == ["id", "sentence1", "sentence2", "prediction", "probability", *names]
    for row, answer, probabilities in zip(rows, found, expected, strict=True):
        assert {name: answer[name] for name in row} == row
        best = max(probabilities, key=probabilities.get)
        assert answer["prediction"] == best
        assert float(answer["probability"]) == pytest.approx(probabilities[best], abs=1e-5)
        assert [float(answer[name]) for name in names] == pytest.approx(
            [probabilities[name.removeprefix("probability_")] for name in names], abs=1e-5
        )


def test_a_regression_model_gives_the_pipelines_scores_alone(similarity: Path, tmp_path: Path):
    rows = [{"sentence1": text, "sentence2": pair} for text, pair in zip(TEXTS, PAIRS, strict=True)]
    target = tmp_path / "out.jsonl"
    predict_file(Predictor(similarity), write_rows(tmp_path / "rows.csv", rows), target)
    expected = by_pipeline(similarity, [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows])
    found = read_rows(target)
    assert [*found[0]] == ["sentence1", "sentence2", "prediction"]
    scores = [row["prediction"] for row in found]
    assert scores == pytest.approx([answer["score"] for answer in expected], abs=1e-5)
    assert len(set(scores)) == len(scores)


def test_order_and_probabilities_do_not_depend_on_how_rows_are_cut(sentiment: Path, monkeypatch: pytest.MonkeyPatch):
    predictor, texts = Predictor(sentiment), TEXTS * 3
    whole = predictor.logits((texts,))
    monkeypatch.setattr(predictor_module, "_ROWS_AT_ONCE", 5)
    done = []
    in_parts = predictor.logits((texts,), batch_size=2, progress=done.append)
    assert torch.allclose(torch.from_numpy(in_parts), torch.from_numpy(whole), atol=1e-5)
    assert done == [5, 5, 2]


def test_texts_are_shown_with_their_labels_probabilities(
    entailment: Path, sentiment: Path, capsys: pytest.CaptureFixture
):
    predict_texts(Predictor(entailment), ["the cat was good | a road"], batch_size=8)
    header, _, row = capsys.readouterr().out.splitlines()
    probabilities = by_pipeline(entailment, [{"text": "the cat was good", "text_pair": "a road"}])[0]
    best = max(probabilities, key=probabilities.get)
    assert header.startswith("| text | pair | prediction | probability | probability_entailment |")
    assert row.startswith(f"| the cat was good | a road | {best} | {probabilities[best]:.3f} |")
    predict_texts(Predictor(sentiment), TEXTS, batch_size=8)
    assert capsys.readouterr().out.count("\n") == 2 + len(TEXTS)


@pytest.mark.parametrize(
    ("columns", "chosen", "read"),
    [
        (["sentence", "text"], {}, "sentence"),  # the task's own comes first
        (["id", "text"], {}, "text"),
        (["anything"], {}, "anything"),
        (["sentence", "other"], {"text_column": "other"}, "other"),
    ],
)
def test_the_text_column_is_the_one_chosen_or_the_tasks_or_a_usual_one(
    columns: list[str], chosen: dict, read: str, sentiment: Path, tmp_path: Path
):
    rows = [{name: text if name == read else "the bad road was awful" for name in columns} for text in TEXTS]
    predictor = Predictor(sentiment)
    predict_file(predictor, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", **chosen)
    predict_file(
        predictor, write_rows(tmp_path / "alone.jsonl", [{"text": text} for text in TEXTS]), tmp_path / "2.jsonl"
    )
    expected = [row["probability"] for row in read_rows(tmp_path / "2.jsonl")]
    assert [row["probability"] for row in read_rows(tmp_path / "out.jsonl")] == expected


def test_a_model_without_a_record_takes_one_text_or_pairs(unknown: Path, capsys: pytest.CaptureFixture):
    predictor = Predictor(unknown)
    assert (predictor.num_sentences, predictor.labels, predictor.max_seq_length) == (None, ("no", "yes"), 32)
    predict_texts(predictor, ["a cat"], batch_size=1)
    predict_texts(predictor, ["a cat | a dog"], batch_size=1)
    assert "| text | pair |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "texts", "message"),
    [
        ("sentiment", ["a cat | a dog"], "takes one text"),
        ("entailment", ["a cat"], "takes pairs of texts"),
        ("unknown", ["a cat | a dog", "a cat"], "takes pairs of texts"),
        ("sentiment", [" "], "is empty"),
    ],
)
def test_texts_that_do_not_fit_are_refused(model: str, texts: list[str], message: str, request: pytest.FixtureRequest):
    with pytest.raises(UserError, match=message):
        predict_texts(Predictor(request.getfixturevalue(model)), texts, batch_size=8)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"id": "1", "comment": "a cat"}], {}, r"has the columns id, comment: say by --text_column which"),
        ([{"comment": "a cat"}], {"text_column": "coment"}, r"has the columns comment, and no 'coment'"),
        ([{"a": "x", "b": "y"}], {"text_column": "a", "pair_column": "b"}, "takes one text: leave --pair_column out"),
        ([{"text": "x"}], {"pair_column": "text"}, "--pair_column needs --text_column"),
        ([{"text": ""}], {}, r"line 1: column 'text' is empty"),
        ([{"text": 5}], {}, r"line 1: column 'text' holds 5, which is not text"),
        ([{"text": "x", "prediction": "y"}], {}, "has a column 'prediction'"),
        ([{"text": "one\ttwo"}], {"target": "out.tsv"}, "row 1 holds a tab or line break"),
        ([{"text": "x"}], {"target": "out.txt"}, r"out.txt does not end in .csv, .tsv, .jsonl"),
        ([{"text": "x"}], {"target": "rows.jsonl"}, "rows.jsonl exists: remove it, or give another --output_file"),
        ([{"text": "x"}], {"target": "rows.jsonl/out.csv"}, r"can't write .*rows.jsonl/out.csv"),
    ],
)
def test_rows_and_files_that_do_not_fit_are_refused_and_nothing_is_written(
    rows: list[dict], options: dict, message: str, sentiment: Path, tmp_path: Path
):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    text = source.read_bytes()
    chosen = {name: value for name, value in options.items() if name != "target"}
    with pytest.raises(UserError, match=message):
        predict_file(Predictor(sentiment), source, tmp_path / options.get("target", "out.csv"), **chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert source.read_bytes() == text


def test_a_pair_model_needs_both_columns(entailment: Path, tmp_path: Path):
    source = write_rows(tmp_path / "rows.csv", [{"a": "x", "b": "y"}])
    with pytest.raises(UserError, match="say by --text_column and --pair_column which"):
        predict_file(Predictor(entailment), source, tmp_path / "out.csv")
    with pytest.raises(UserError, match="takes pairs: give --text_column and --pair_column"):
        predict_file(Predictor(entailment), source, tmp_path / "out.csv", text_column="a")


def test_rows_longer_than_the_model_are_refused_by_their_length(sentiment: Path):
    with pytest.raises(UserError, match=r"max_seq_length is 33: .* takes from 1 to 32 tokens"):
        Predictor(sentiment, max_seq_length=33)


def test_a_prediction_that_fails_leaves_no_file(sentiment: Path, tmp_path: Path):
    predictor = Predictor(sentiment)
    with torch.no_grad():
        predictor.classifier.classifier.bias.fill_(torch.nan)
    source = write_rows(tmp_path / "rows.csv", [{"text": "x"}])
    with pytest.raises(UserError, match="does not predict finite numbers"):
        predict_file(predictor, source, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give texts or an --input_file"),
        (["a cat", "--input_file", "rows.csv"], "give texts or an --input_file"),
        (["a cat", "--text_column", "text"], "go with --input_file"),
        (["--input_file", "rows.csv"], "needs an --output_file"),
        (["a cat", "--batch_size", "0"], "batch_size"),
    ],
)
def test_options_that_contradict_each_other_are_refused(argv: list[str], message: str, sentiment: Path):
    with pytest.raises(UserError, match=message):
        commands.predict([str(sentiment), *argv])


def test_the_command_predicts_a_file_and_tells_rows_a_second(
    sentiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    source = write_rows(tmp_path / "rows.csv", [{"text": text} for text in TEXTS])
    target = tmp_path / "out.tsv"
    commands.predict([str(sentiment), "--input_file", str(source), "--output_file", str(target)])
    assert len(read_rows(target)) == len(TEXTS)
    output = capsys.readouterr()
    assert f"{target}: 4 rows, " in output.out
    assert "rows/s on cpu" in output.out
    assert output.err == ""
