import csv
import json
from pathlib import Path

import datasets
import pytest

from common.errors import UserError
from finetune.examples import Examples, data_sha256, read_split, read_task, require_files
from finetune.own_task import OwnTask
from finetune.tasks import AX, TASKS, Task, own_task

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
        "0\t1\t1n\tx\t(a)\t(b)\ta\tb\tIt rains.\tIt is dry.\tneutral\tcontradiction",
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
# The official headers of test files, where they are not those of the training file without its label.
TEST_HEADERS = {
    "cola": "index sentence",
    "sst2": "index sentence",
    "mrpc": "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "qqp": "id question1 question2",
    "mnli": MNLI_DEV.split(" label1")[0],
    "ax": "index sentence1 sentence2",
}
HUB_NAMES = {  # of the labels that GLUE's data set on the hub has, where its files have numbers
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "wnli": ["not_entailment", "entailment"],
}


def tabbed(header: str) -> str:
    return header if "\t" in header else header.replace(" ", "\t")


def layout_text(task_name: str) -> str:
    header, row, _, _ = LAYOUTS[task_name]
    return (tabbed(header) + "\n" if header else "") + row + "\n"


def glue_file(glue_dir: Path, task: Task, split: str, text: str) -> Path:
    path = glue_dir / task.folder / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def read_text(glue_dir: Path, task_name: str, text: str, split: str = "train") -> Examples:
    glue_file(glue_dir, TASKS[task_name], split, text)
    return read_split(TASKS[task_name], split, glue_dir)


@pytest.mark.parametrize("task_name", TASKS)
def test_reads_each_tasks_official_layout(task_name: str, tmp_path: Path):
    examples = read_text(tmp_path, task_name, layout_text(task_name))
    assert (tuple(texts[0] for texts in examples.sentences), examples.labels[0]) == LAYOUTS[task_name][2:]


def test_reads_mnlis_development_layout(tmp_path: Path):
    row = "\t".join(["0", *"-------", "It rains.", "It is wet. ", *"-----", "neutral"])
    examples = read_text(tmp_path, "mnli", tabbed(MNLI_DEV) + f"\n{row}\n", "dev_mismatched")
    assert (examples.sentences, examples.labels) == ((["It rains."], ["It is wet. "]), [1])


@pytest.mark.parametrize(
    ("task", "split"), [(task, split.name) for task in (*TASKS.values(), AX) for split in task.test_splits]
)
def test_reads_each_official_test_layout_in_its_order_and_without_labels(task: Task, split: str, tmp_path: Path):
    header = tabbed(TEST_HEADERS.get(task.task_name, LAYOUTS.get(task.task_name, ("",))[0]))
    columns = [name for name in header.split("\t") if name != task.label_column]
    rows = [[f"{name} {row}" for name in columns] for row in range(2)]
    glue_file(tmp_path, task, split, "".join("\t".join(row) + "\n" for row in [columns, *rows]))
    expected = tuple([f"{name} 0", f"{name} 1"] for name in task.sentence_columns)
    assert read_split(task, split, tmp_path) == Examples(expected, None)


def test_the_diagnostic_set_is_found_where_the_usual_download_puts_it(tmp_path: Path):
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert len(read_split(AX, "diagnostic", tmp_path)) == 1


def test_byte_order_marks_windows_line_ends_and_line_separators_in_text_are_no_trouble(tmp_path: Path):
    text = "\ufeffsentence\tlabel\r\none\u2028line\x85of text\t1\r\nlast\t0"
    examples = read_text(tmp_path, "sst2", text)
    assert (examples.sentences, examples.labels) == ((["one\u2028line\x85of text", "last"],), [1, 0])


def test_questions_with_line_breaks_are_left_out_as_in_the_official_counts(tmp_path: Path):
    broken = '7\t8\t9\t"Why\n is it so?"\tWho?\t0\n'
    assert len(read_text(tmp_path, "qqp", layout_text("qqp") + broken)) == 1


def test_no_row_of_a_test_file_is_ever_left_out(tmp_path: Path):
    with pytest.raises(UserError, match="line 3 has 2 columns instead of 3"):
        read_text(tmp_path, "qqp", "id\tquestion1\tquestion2\n0\ta\tb\n1\tc\n", "test")


def test_qqps_official_rows_without_a_question_are_kept(tmp_path: Path):
    assert read_text(tmp_path, "qqp", layout_text("qqp") + "7\t8\t9\tWhy?\t\t0\n").sentences[1] == ["Who?", ""]


RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
WRONG_FILES = {
    "missing": (None, "does not exist"),
    "empty": ("", "no column 'sentence1'"),
    "header alone": (RTE_HEADER, "has no rows"),
    "other task": (layout_text("sst2"), "no column 'sentence1'"),
    "other label": (RTE_HEADER + "0\ta\tb\tneutral\n", "line 2: label 'neutral'"),
    "no label": (
        RTE_HEADER + "0\ta\tb\t-1\n",
        "line 2: label '-1' is not one of RTE's (entailment, not_entailment): is",
    ),
    "test set": ("index\tsentence1\tsentence2\n0\ta\tb\n", "no column 'label'"),
    "short row": (RTE_HEADER + "0\ta\tentailment\n", "line 2 has 3 columns instead of 4"),
    "empty text": (RTE_HEADER + "0\ta\tb\tentailment\n1\ta\t \tentailment\n", "line 3: column 'sentence2' is empty"),
    "not UTF-8": (RTE_HEADER + "0\ta\t\udcff\tentailment\n", "line 2 is not UTF-8"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused_in_one_line_that_names_them(case: str, tmp_path: Path):
    text, expected = WRONG_FILES[case]
    path = tmp_path / "RTE" / "dev.tsv"
    path.parent.mkdir()
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as refusal:
        read_split(TASKS["rte"], "dev", tmp_path)
    assert expected in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_colas_test_set_in_the_development_sets_place_is_told_as_such(tmp_path: Path):
    with pytest.raises(UserError, match=r"dev.tsv has no column 'label' .*; is this a test set"):
        read_text(tmp_path, "cola", "index\tsentence\n0\tBill whistled.\n", "dev")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("nan", "'nan' is not a score"),
        ("", "'' is not a score"),
        ("5.2", "score 5.2 is not between 0 and 5$"),
        ("-1", "score -1 is not between 0 and 5: is this a test set"),
    ],
)
def test_scores_must_be_numbers_in_the_tasks_range(score: str, expected: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"line 2: {expected}"):
        read_text(tmp_path, "stsb", layout_text("stsb").replace("3.750", score))


def test_all_missing_files_are_named_in_one_line(tmp_path: Path):
    glue_file(tmp_path, TASKS["mnli"], "dev_matched", layout_text("mnli"))
    wanted = [(TASKS[name], split) for name in ("mnli", "rte") for split in TASKS[name].splits]
    with pytest.raises(UserError) as refusal:
        require_files(wanted, tmp_path)
    missing = ("MNLI/train.tsv", "MNLI/dev_mismatched.tsv", "RTE/train.tsv", "RTE/dev.tsv")
    names = ", ".join(str(tmp_path / name) for name in missing)
    assert str(refusal.value).startswith(f"{names} do not exist: needed for mnli, rte;")


@pytest.mark.parametrize(
    ("train", "dev", "told"),
    [
        ("ab", "ab", "all rows of dev are in train"),
        ("abc", "ba", "all rows of dev are in train"),
        ("ab", "cab", "all rows of train are in dev"),
    ],
)
def test_training_on_what_is_scored_is_refused(train: str, dev: str, told: str, tmp_path: Path):
    for split, texts in (("train", train), ("dev", dev)):
        glue_file(tmp_path, TASKS["sst2"], split, "sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    with pytest.raises(UserError, match=f"^SST-2: {told} too: a score on dev would mean nothing$"):
        read_task(TASKS["sst2"], tmp_path)


def test_some_rows_in_both_sets_are_no_trouble(tmp_path: Path):
    for split, texts in (("train", "ab"), ("dev", "bc")):
        glue_file(tmp_path, TASKS["sst2"], split, "sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert read_task(TASKS["sst2"], tmp_path)["dev"].sentences == (["b", "c"],)


def hub_rows(task: Task, label: int | float) -> datasets.Dataset:
    """One row as `nyu-mll/glue` has it: its columns, label names and types."""
    names = HUB_NAMES.get(task.task_name, task.labels)
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    columns = task.hub_sentence_columns or task.sentence_columns
    texts = LAYOUTS["mnli" if task is AX else task.task_name][2]
    row = {column: [text] for column, text in zip(columns, texts, strict=True)}
    features = {**dict.fromkeys(columns, datasets.Value("string")), "label": feature, "idx": datasets.Value("int32")}
    return datasets.Dataset.from_dict({**row, "label": [label], "idx": [0]}, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """The hub: `rows` by split, and what was asked of it."""

    class Hub:
        def __init__(self) -> None:
            self.rows: dict[str, datasets.Dataset] = {}
            self.asked: list[tuple] = []

        def load_dataset(self, name: str, config: str | None, split: str) -> datasets.Dataset:
            self.asked.append((name, config, split))
            return self.rows[split]

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.is_glue], ids=lambda task: task.task_name)
def test_the_hub_and_the_files_give_the_same_rows_and_checksum(task: Task, hub, tmp_path: Path):
    label = 3.8 if task.task_name == "stsb" else LAYOUTS[task.task_name][3]  # 3.8 is another number in float32
    hub.rows["train"] = hub_rows(task, label)
    glue_file(tmp_path, task, "train", layout_text(task.task_name).replace("3.750", "3.800"))
    from_hub, from_files = read_split(task, "train", None), read_split(task, "train", tmp_path)
    assert from_hub == from_files
    assert data_sha256({"train": from_hub}) == data_sha256({"train": from_files})
    assert hub.asked == [("nyu-mll/glue", task.hub_config, "train")]


@pytest.mark.parametrize(
    ("task", "split", "hub_split"),
    [(TASKS["mnli"], "test_mismatched", "test_mismatched"), (TASKS["rte"], "test", "test"), (AX, "diagnostic", "test")],
)
def test_labels_of_the_hubs_test_splits_are_never_read(task: Task, split: str, hub_split: str, hub):
    hub.rows[hub_split] = hub_rows(task, -1)
    assert read_split(task, split, None).labels is None


def test_the_hubs_development_splits_are_its_validation_splits_and_must_have_labels(hub):
    hub.rows["validation_mismatched"] = hub_rows(TASKS["mnli"], 1)
    assert read_split(TASKS["mnli"], "dev_mismatched", None).labels == [1]
    hub.rows["validation"] = hub_rows(TASKS["qnli"], -1)
    with pytest.raises(UserError, match=r"split validation, row 1: label '-1' is not one of QNLI's .* test set"):
        read_split(TASKS["qnli"], "dev", None)


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^nyu-mll/glue \(rte\) cannot be loaded \(no route\): give --glue_dir$"):
        read_task(TASKS["rte"], None)


def test_a_checksum_follows_texts_labels_and_splits():
    examples = Examples((["a", "b"], ["c", "d"]), [0, 1])
    others = [
        Examples((["a", "b"], ["c", "e"]), [0, 1]),
        Examples((["a", "b"], ["c", "d"]), [1, 0]),
        Examples((["a", "b"], ["c", "d"]), None),
        Examples((["a", "b", "c", "d"],), [0, 1]),
    ]
    assert len({each.sha256 for each in (examples, *others)}) == 5
    assert Examples((["a"] * 1000, ["b"] * 1000), None).sha256 != Examples((["a"] * 1000 + ["b"] * 1000,), None).sha256
    assert data_sha256({"train": examples, "dev": others[0]}) != data_sha256({"train": others[0], "dev": examples})


OWN_ROWS = [('He said "go",\nand left', "yes"), ("plain\ttext", "no")]


def own(train: str, dev: str = "dev.csv", **changes) -> Task:
    fields = {"sentence_columns": ["text"], "label_column": "answer", "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return own_task(OwnTask(task_name="own", train=train, dev=dev, **{**fields, **changes}))


def write_own(path: Path, rows: list[tuple]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps({"id": 1, "text": text, "answer": answer}) + "\n" for text, answer in rows)
        elif path.suffix == ".csv":
            csv.writer(file).writerows([("text", "answer"), *rows])
        else:
            file.writelines(f"{text}\t{answer}\n" for text, answer in [("text", "answer"), *rows])
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_quoted_csv_and_json_lines_give_their_texts_whole(ending: str, tmp_path: Path):
    task = own(write_own(tmp_path / f"train{ending}", OWN_ROWS))
    assert read_split(task, "train", None) == Examples(([text for text, _ in OWN_ROWS],), [1, 0])


def test_quotes_in_own_tsv_files_are_ordinary_characters(tmp_path: Path):
    task = own(write_own(tmp_path / "train.tsv", [('"a', "yes"), ("b", "no")]))
    assert read_split(task, "train", None) == Examples((['"a', "b"],), [1, 0])


@pytest.mark.parametrize("labels", [["0", "1"], [0, 1]])
@pytest.mark.parametrize("written", [[1, 0], ["1", "0"], [1.0, 0.0]])
def test_labels_may_be_text_or_numbers(labels: list, written: list, tmp_path: Path):
    task = own(write_own(tmp_path / "train.jsonl", list(zip("ab", written, strict=True))), labels=labels)
    assert read_split(task, "train", None).labels == [1, 0]


def test_an_own_task_without_labels_has_scores(tmp_path: Path):
    path = write_own(tmp_path / "train.csv", [("a", "-0.5"), ("b", "7")])
    task = own(path, labels=None, metrics=["pearson"])
    assert read_split(task, "train", None).labels == [-0.5, 7.0]
    write_own(tmp_path / "train.csv", [("a", "-1"), ("b", "-1")])
    with pytest.raises(UserError, match="every score is -1, as in a test set"):
        read_split(task, "train", None)


def test_own_rows_come_from_any_data_set_by_label_name_or_number(hub):
    feature = datasets.ClassLabel(names=["yes", "no"])
    features = datasets.Features({"text": datasets.Value("string"), "answer": feature})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "answer": [0, 1]}, features=features)
    hub.rows = {"train[:90%]": rows}
    by_name = own("train[:90%]", "train[90%:]", dataset="me/answers", dataset_config="en")
    assert read_split(by_name, "train", None) == Examples((["a", "b"],), [1, 0])
    by_number = own("train[:90%]", "train[90%:]", dataset="me/answers", labels=[0, 1])
    assert read_split(by_number, "train", None).labels == [0, 1]
    assert hub.asked == [("me/answers", "en", "train[:90%]"), ("me/answers", None, "train[:90%]")]


WRONG_OWN_FILES = {
    "open quote": ("a.csv", 'text,answer\nfine,yes\n"never closed,yes\n', "line 3 is not CSV"),
    "long row": ("a.csv", 'text,answer\n"two\nlines",yes\na,b,yes\n', "line 4 has 3 columns instead of 2"),
    "not JSON": ("a.jsonl", '{"text": "a", "answer": "yes"}\n{"text"\n', "line 2 is not a JSON object"),
    "half a surrogate pair": ("a.jsonl", '{"text": "\\ud800", "answer": "yes"}\n', "line 1 is not a JSON object"),
    "no text": ("a.jsonl", '{"text": "a", "answer": "yes"}\n{"answer": "no"}\n', "line 2: column 'text' is empty"),
    "number as text": ("a.jsonl", '{"text": 7, "answer": "yes"}\n', "line 1: column 'text' holds 7, which is not text"),
    "no label": ("a.jsonl", '{"text": "a", "answer": null}\n', "line 1: label '' is not one of own's (no, yes): is"),
    "no such column": ("a.csv", "sentence,answer\na,yes\n", "no column 'text' (it has: sentence, answer)"),
    "nothing": ("a.jsonl", "", "no column 'text'"),
}


@pytest.mark.parametrize("case", WRONG_OWN_FILES)
def test_wrong_own_files_are_refused_in_one_line_that_names_them(case: str, tmp_path: Path):
    name, text, expected = WRONG_OWN_FILES[case]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        read_split(own(str(path)), "train", None)
    assert expected in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_own_files_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no.csv, dev.csv do not exist: needed for own; put train and dev of own_tasks"
    ):
        read_task(own("no.csv"), tmp_path)


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the shared GLUE files are not here")
@pytest.mark.parametrize("task_name", [name for name in TASKS if TASKS[name].is_glue])
def test_row_counts_and_last_rows_of_the_official_files(task_name: str):
    task = TASKS[task_name]
    sizes = {**task.official_rows, **{split.name: split.rows for split in task.test_splits}}
    for split, size in sizes.items():
        path = SHARED_GLUE / task.folder / f"{split}.tsv"
        if not path.exists():
            continue
        examples = read_split(task, split, SHARED_GLUE)
        assert len(examples) == size
        with path.open(encoding="utf-8", newline="\n") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        columns = task.columns_without_header if task.columns_without_header and split != "test" else rows[0]
        last = dict(zip(columns, rows[-1], strict=True))
        assert [texts[-1] for texts in examples.sentences] == [last[column] for column in task.sentence_columns]


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the shared GLUE files are not here")
def test_label_counts_of_the_official_development_files():
    counts = {"cola": 721, "sst2": 444, "mrpc": 279, "wnli": 31, "rte": 131, "qnli": 2761}
    for task_name, positive in counts.items():
        assert sum(read_split(TASKS[task_name], "dev", SHARED_GLUE).labels) == positive
