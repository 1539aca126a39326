import csv
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from finetune.data import (
    data_sha256,
    evaluation_batches,
    load_tokenized,
    num_batches,
    read_task,
    read_tsv,
    tokenize_task,
    training_batches,
)
from finetune.tasks import TASKS, benchmark_title

SHARED_GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
MNLI_DEV = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    " sentence1 sentence2 label1 label2 label3 label4 label5 gold_label"
)
MNLI_TRAIN = MNLI_DEV.replace(" label2 label3 label4 label5", "")
# Each task's official header, one row, and what it says.
LAYOUTS = {
    "cola": ("", "gj04\t0\t*\tThey drank the pub.", ("They drank the pub.",), 0),
    "sst2": ("sentence label", 'a "charming film \t1', ('a "charming film ',), 1),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\tHe said.\t"He spoke.',
        ("He said.", '"He spoke.'),
        1,
    ),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "0\tg\tf\t2012\t0000\tnone\tnone\tA man.\tA woman.\t3.750",
        ("A man.", "A woman."),
        3.75,
    ),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "0\t1\t2\tWhy?\tWho?\t0", ("Why?", "Who?"), 0),
    "mnli": (
        MNLI_TRAIN,
        "0\t1\t1n\tx\t(a)\t(b)\ta\tb\tIt rains.\tIt is dry.\t-\tcontradiction",
        ("It rains.", "It is dry."),
        2,
    ),
    "qnli": ("index question sentence label", "3\tWho?\tHe did.\tentailment", ("Who?", "He did."), 0),
    "rte": ("index sentence1 sentence2 label", "3\tHe did.\tShe did.\tnot_entailment", ("He did.", "She did."), 1),
    "wnli": ("index sentence1 sentence2 label", "3\tIt fell.\tShe fell.\t1", ("It fell.", "She fell."), 1),
    "demo_sentiment": ("sentence label", "fine .\t1", ("fine .",), 1),
    "demo_entailment": (
        "index sentence1 sentence2 label",
        "0\tA cat.\tAn animal.\tentailment",
        ("A cat.", "An animal."),
        0,
    ),
    "demo_similarity": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "0\tdemo\tdemo\tnone\tnone\tdemo\tdemo\tA cat.\tA dog.\t2.000",
        ("A cat.", "A dog."),
        2.0,
    ),
}


def layout_text(task_name: str) -> str:
    header, row, _, _ = LAYOUTS[task_name]
    header = header if "\t" in header else header.replace(" ", "\t")
    return (header + "\n" if header else "") + row + "\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("task_name", TASKS)
def test_reads_each_tasks_official_layout(task_name: str, tmp_path: Path):
    examples = read_tsv(TASKS[task_name], write(tmp_path / "train.tsv", layout_text(task_name)))
    assert (tuple(texts[0] for texts in examples.sentences), examples.labels[0]) == LAYOUTS[task_name][2:]


def test_reads_mnlis_development_layout(tmp_path: Path):
    row = "\t".join(["0", *"-------", "It rains.", "It is wet. ", *"-----", "neutral"])
    text = MNLI_DEV.replace(" ", "\t") + f"\n{row}\n"
    examples = read_tsv(TASKS["mnli"], write(tmp_path / "dev_matched.tsv", text))
    assert (examples.sentences, examples.labels) == ((["It rains."], ["It is wet. "]), [1])


def test_byte_order_marks_windows_line_ends_and_line_separators_in_text_are_no_trouble(tmp_path: Path):
    text = "\ufeffsentence\tlabel\r\none\u2028line\x85of text\t1\r\nlast\t0"
    examples = read_tsv(TASKS["sst2"], write(tmp_path / "train.tsv", text))
    assert (examples.sentences, examples.labels) == ((["one\u2028line\x85of text", "last"],), [1, 0])


def test_questions_with_line_breaks_are_left_out_as_in_the_official_counts(tmp_path: Path):
    broken = '7\t8\t9\t"Why\n is it so?"\tWho?\t0\n'
    examples = read_tsv(TASKS["qqp"], write(tmp_path / "train.tsv", layout_text("qqp") + broken))
    assert len(examples.labels) == 1


WRONG_FILES = {
    "missing": (None, "does not exist"),
    "empty": ("", "no column 'sentence1'"),
    "header alone": ("index\tsentence1\tsentence2\tlabel\n", "has no rows"),
    "other task": (layout_text("sst2"), "no column 'sentence1'"),
    "other label": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", "line 2: label 'neutral'"),
    "short row": ("index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n", "line 2 has 3 columns instead of 4"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused_in_one_line_that_names_them(case: str, tmp_path: Path):
    text, expected = WRONG_FILES[case]
    path = tmp_path / "train.tsv"
    if text is not None:
        write(path, text)
    with pytest.raises(UserError) as refusal:
        read_tsv(TASKS["rte"], path)
    assert expected in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_scores_must_be_numbers(tmp_path: Path):
    text = layout_text("stsb").replace("3.750", "nan")
    with pytest.raises(UserError, match="line 2: 'nan' is not a score"):
        read_tsv(TASKS["stsb"], write(tmp_path / "train.tsv", text))


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the shared GLUE files are not here")
@pytest.mark.parametrize("task_name", [name for name in TASKS if not TASKS[name].synthetic])
def test_row_counts_and_labels_of_the_official_files(task_name: str):
    task = TASKS[task_name]
    paths = {split: SHARED_GLUE / task.folder / f"{split}.tsv" for split in task.splits}
    for split, path in ((split, path) for split, path in paths.items() if path.exists()):
        examples = read_tsv(task, path)
        assert len(examples.labels) == task.official_rows[split]
        with path.open(encoding="utf-8", newline="\n") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        last = rows[-1] if task.columns_without_header else dict(zip(rows[0], rows[-1], strict=True))
        expected = [last[3]] if task.columns_without_header else [last[column] for column in task.sentence_columns]
        assert [texts[-1] for texts in examples.sentences] == expected


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the shared GLUE files are not here")
def test_label_counts_of_the_official_development_files():
    counts = {"cola": 721, "sst2": 444, "mrpc": 279, "wnli": 31, "rte": 131, "qnli": 2761}
    for task_name, positive in counts.items():
        task = TASKS[task_name]
        assert sum(read_tsv(task, SHARED_GLUE / task.folder / "dev.tsv").labels) == positive


def test_the_hub_and_the_files_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub_rows = {"sentence1": ["He said."], "sentence2": ['"He spoke.'], "label": [1], "idx": [0]}
    asked = []

    def load_dataset(name: str, config: str, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict(hub_rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "MRPC").mkdir()
    for split in ("train", "dev"):
        write(tmp_path / "MRPC" / f"{split}.tsv", layout_text("mrpc"))
    from_hub, from_files = read_task(TASKS["mrpc"], None), read_task(TASKS["mrpc"], tmp_path)
    assert from_hub == from_files
    assert data_sha256(from_hub) == data_sha256(from_files)
    assert asked == [("nyu-mll/glue", "mrpc", "train"), ("nyu-mll/glue", "mrpc", "validation")]


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^nyu-mll/glue \(rte\) cannot be loaded \(no route\): give --glue_dir$"):
        read_task(TASKS["rte"], None)


@pytest.fixture(scope="module")
def tokenized(glue_dir: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache") / "stsb"
    tokenize_task(read_task(TASKS["stsb"], glue_dir), AutoTokenizer.from_pretrained(model_folder), 20, folder)
    return load_tokenized(folder)


def test_batches_equal_the_tokenizers_own_truncation_and_padding(tokenized, glue_dir: Path, model_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = read_task(TASKS["stsb"], glue_dir)["train"]
    assert max(tokenized.splits["train"].lengths) == 20, "the data should have rows that are cut"
    for batch in training_batches(tokenized.splits["train"], 7, tokenized.pad_token_id, seed=[1, 1]):
        texts = [[texts[row] for row in batch.rows] for texts in examples.sentences]
        expected = tokenizer(*texts, truncation="longest_first", max_length=20, padding=True, return_tensors="pt")
        assert batch.inputs.keys() == expected.keys()
        assert all((batch.inputs[name] == expected[name]).all() for name in expected)
        assert batch.labels.tolist() == [examples.labels[row] for row in batch.rows]


def test_an_epoch_has_every_row_once_in_an_order_that_follows_from_the_seed(tokenized):
    def order(*seed: int) -> list[int]:
        batches = list(training_batches(tokenized.splits["train"], 5, 0, seed=list(seed)))
        assert len(batches) == num_batches(tokenized.splits["train"], 5)
        return np.concatenate([batch.rows for batch in batches]).tolist()

    assert sorted(order(1, 1)) == list(range(48))
    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2) != order(2, 1)


def test_rows_of_similar_length_share_a_batch(tokenized):
    data = tokenized.splits["train"]

    def padding(batches) -> int:
        return sum(int((batch.inputs["attention_mask"] == 0).sum()) for batch in batches)

    shuffled = np.random.default_rng(0).permutation(len(data)).reshape(-1, 8)
    unsorted = sum(int((data.lengths[rows].max() - data.lengths[rows]).sum()) for rows in shuffled)
    assert padding(training_batches(data, 8, 0, seed=[1])) < unsorted / 2
    assert padding(evaluation_batches(data, 8, 0)) < unsorted / 2


def test_tokenised_arrays_are_mapped_not_copied_and_never_made_twice(tokenized, glue_dir: Path, tmp_path: Path):
    assert isinstance(tokenized.splits["train"].input_ids, np.memmap)
    made = tmp_path / "made"
    made.mkdir()
    tokenize_task({}, None, 20, made)
    assert os.listdir(made) == []


def test_synthetic_tasks_are_never_called_glue():
    assert benchmark_title(["demo_sentiment"]) == "Synthetic demo benchmark (not GLUE)"
    assert benchmark_title(["rte"]) == "GLUE, development set"
    assert "synthetic" in benchmark_title(["rte", "demo_sentiment"])
    assert all(task.synthetic == name.startswith("demo_") for name, task in TASKS.items())
