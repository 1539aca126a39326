import contextlib
import io
import json
import math
from pathlib import Path

import pytest

from common.errors import UserError
from finetune.own_data import find_own_task
from finetune.train_flags import Request, read_flags

MODEL = ["--model_name_or_path", "M", "--output_dir", "O"]
# The commands that users of run_glue, run_flax_glue and M-FAC type, but for names.
RUN_GLUE = (
    "--model_name_or_path M --task_name MRPC --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32"
    " --learning_rate 2e-5 --num_train_epochs 3 --output_dir O --fp16"
).split()
RUN_FLAX_GLUE = (
    "--model_name_or_path M --task_name mnli_matched --max_seq_length 128 --learning_rate 2e-5 --num_train_epochs 3"
    " --per_device_train_batch_size 4 --eval_steps 100 --output_dir O --push_to_hub"
).split()
MFAC = [
    *"--seed 1234 --model_name_or_path M --task_name qqp --do_train --do_eval --max_seq_length 128".split(),
    *"--per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 5 --output_dir O --optim MFAC".split(),
    "--optim_args",
    '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}',
]


def of_task(*more: str) -> Request:
    return read_flags([*MODEL, "--task_name", "sst2", *more])


def write_csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_command_of_run_glue_is_one_configuration_of_a_grid():
    request = read_flags(RUN_GLUE)
    (cell,) = request.config.cells(["fp16"])["mrpc"]
    assert (cell.learning_rate, cell.batch_size, cell.num_epochs, cell.seed) == (2e-5, 32, 3, 42)
    assert (request.config.precision, request.config.weight_decay, request.config.warmup_proportion) == (["fp16"], 0, 0)
    assert request.config.score_epoch == "last"
    assert not request.evaluates
    assert not request.predicts


def test_a_command_of_run_flax_glue_trains_evaluates_and_publishes_under_the_folders_name():
    request = read_flags(RUN_FLAX_GLUE)
    (cell,) = request.config.cells(["fp32"])["mnli_matched"]
    assert (cell.batch_size, request.config.eval_steps, request.repo_id) == (4, 100, "O")


def test_a_command_of_mfac_names_the_optimizer_and_its_arguments():
    (cell,) = read_flags(MFAC).config.cells(["fp32"])["qqp"]
    optimizer = cell.optimizer
    assert (optimizer.name, optimizer.num_grads, optimizer.damp) == ("mfac", 1024, 1e-6)
    assert (cell.learning_rate, cell.seed) == (1e-4, 1234)


def test_what_is_not_given_is_as_run_glue_has_it():
    config = of_task().config
    (cell,) = config.cells(["fp32"])["sst2"]
    assert (cell.learning_rate, cell.batch_size, cell.num_epochs, cell.seed) == (5e-5, 8, 3, 42)
    assert (config.max_seq_length, config.max_gradient_norm, config.lr_schedule) == (128, 1.0, "linear")
    assert (config.precision, config.save_steps, config.logging_steps) == (["fp32"], 500, 500)


def test_flags_reach_the_grid():
    flags = (
        "--num_seeds 3 --seed 7 --gradient_accumulation_steps 4 --warmup_steps 10 --lr_scheduler_type cosine"
        " --max_grad_norm 0.5 --load_best_model_at_end --precision fp32 bf16 --max_train_samples 9 --max_eval_samples 5"
        " --adam_beta2 0.98 --report_to none --weight_decay 0.01 --save_steps 20 --max_seq_length 64"
    )
    config = of_task(*flags.split()).config
    cells = config.cells(config.precision)["sst2"]
    assert [(cell.seed, cell.precision) for cell in cells] == [(s, p) for p in ("fp32", "bf16") for s in (7, 8, 9)]
    assert {cell.batch_size for cell in cells} == {32}, "rows of an optimizer step"
    assert {cell.optimizer.adam_beta2 for cell in cells} == {0.98}
    assert (config.warmup_steps, config.lr_schedule, config.max_gradient_norm) == (10, "cosine", 0.5)
    assert (config.score_epoch, config.weight_decay, config.save_steps) == ("best", 0.01, 20)
    assert (config.max_train_rows, config.max_eval_rows) == ({"sst2": 9}, {"sst2": 5})
    assert (config.logging_steps, config.max_seq_length) == (None, 64)


def test_several_tasks_are_trained_at_a_time_whatever_the_case_of_their_names():
    request = read_flags([*MODEL, "--task_name", "RTE", "mnli_Mismatched"])
    assert request.task_names == list(request.config.cells(["fp32"])) == ["rte", "mnli_mismatched"]


@pytest.mark.parametrize(("num_epochs", "num_steps"), [("0.4", 3), ("1.5", 9), ("2.0", None)])
def test_a_share_of_an_epoch_is_rounded_up_to_whole_steps(num_epochs: str, num_steps: int | None, glue_dir: Path):
    """48 rows in batches of 8: 6 steps an epoch."""
    config = of_task("--num_train_epochs", num_epochs, "--glue_dir", str(glue_dir)).config
    assert config.max_steps == num_steps
    assert config.grids[0].num_epochs == [math.ceil(float(num_epochs))]


@pytest.mark.parametrize(("max_steps", "num_epochs"), [(6, 1), (7, 2), (13, 3)])
def test_max_steps_goes_before_epochs_and_needs_as_many_as_it_needs(max_steps: int, num_epochs: int, glue_dir: Path):
    config = of_task("--max_steps", str(max_steps), "--glue_dir", str(glue_dir), "--num_train_epochs", "1").config
    assert (config.max_steps, config.grids[0].num_epochs) == (max_steps, [num_epochs])


def test_evaluation_alone_trains_nothing():
    request = of_task("--do_eval")
    assert request.config is None
    assert request.evaluates


def test_eval_strategy_decides_whether_eval_steps_count():
    assert of_task("--eval_steps", "5", "--eval_strategy", "epoch").config.eval_steps is None
    assert of_task("--eval_steps", "5", "--eval_strategy", "steps").config.eval_steps == 5


WRONG = {
    "--task_name sst3": "no task 'sst3'; there are: cola",
    "--task_name sst2 --fp16 --bf16": "--fp16, --bf16 and --precision contradict",
    "--task_name sst2 --bf16 --precision fp32 bf16": "contradict",
    "--task_name sst2 --train_file t.csv": "--task_name and --train_file contradict",
    "--train_file t.csv": "--train_file and --validation_file",
    "--do_train": "give --task_name",
    "--task_name sst2 --overwrite_output_dir": "nothing is destroyed here",
    "--task_name sst2 --hub_token hf_123": "hf auth login",
    "--task_name sst2 --pad_to_max_length": "no --pad_to_max_length here: rows are padded",
    "--task_name sst2 --lerning_rate 1": "no --lerning_rate here: the nearest one is --learning_rate",
    "--task_name sst2 --learning_rate fast": "learning_rate",
    "--task_name sst2 --learning_rate 0": "learning_rate",
    "--task_name sst2 --learning_rate 2": "learning_rate has 2.0",
    "--task_name sst2 --num_seeds 0": "num_seeds",
    "--task_name sst2 --num_train_epochs -1": "num_train_epochs",
    "--task_name sst2 --lr_scheduler_type polynomial": "lr_scheduler_type",
    "--task_name sst2 --warmup_ratio 2": "--warmup_ratio is 2.0",
    "--task_name sst2 --eval_strategy steps": "needs --eval_steps",
    "--task_name sst2 --optim sgd": "sgd",
    "--task_name sst2 --optim MFAC --adam_beta1 0.8": "adam_beta1",
    "--task_name sst2 --optim MFAC --optim_args lr=1e-4 --learning_rate 1e-3": "contradicts --optim_args' lr 0.0001",
    "--task_name sst2 sst2": "--task_name has a task twice",
    "--task_name sst2 rte --push_to_hub": "one task at a time",
    "--task_name sst2 --do_eval --push_to_hub": "--push_to_hub publishes what",
    "--task_name sst2 --hub_model_id me/it": "--hub_model_id",
    "--task_name sst2 --report_to wandb": "report_to",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_end_in_one_line(flags: str):
    with pytest.raises(UserError) as error:
        read_flags([*MODEL, *flags.split()])
    assert WRONG[flags] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_secret_is_not_repeated():
    with pytest.raises(UserError) as error:
        of_task("--hub_token", "hf_123")
    assert "hf_123" not in str(error.value)


def test_help_tells_flags_in_groups_with_units_and_defaults():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        read_flags(["--help"])
    text = " ".join(output.getvalue().split())
    assert "learning rate: --learning_rate" in text
    assert "default: 5e-05" in text
    assert "optimizer steps between evaluations" in text


# --- own data ---


def found(tmp_path: Path, header: str, rows: list[str], **names):
    train = write_csv(tmp_path / "train.csv", header, rows)
    return find_own_task(train, tmp_path / "dev.csv", names.get("texts"), names.get("label", "label"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "2", "1", "2"], ["1", "2", "10"]),
        (["no", "yes", "maybe"], ["maybe", "no", "yes"]),
        (["0.5", "1", "2"], None),
        (["1", "2", "two"], ["1", "2", "two"]),
    ],
)
def test_labels_are_sorted_as_run_glue_sorts_them_and_fractions_are_scores(
    labels: list[str], classes: list[str] | None, tmp_path: Path
):
    task = found(tmp_path, "sentence,label", [f"a text,{label}" for label in labels])
    assert task.labels == classes
    assert task.metrics == (["accuracy"] if classes else ["pearson", "spearman"])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([1, 0, 10, 2], ["0", "1", "2", "10"]), (["10", "2"], ["10", "2"]), ([True, False], ["false", "true"])],
)
def test_labels_in_json_are_what_json_says(labels: list, classes: list[str], tmp_path: Path):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    assert find_own_task(train, tmp_path / "dev.jsonl", None, "label").labels == classes


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ("label,sentence2,sentence1,id", ["sentence1", "sentence2"]),
        ("id,sentence,label", ["sentence"]),
        ("label,review", ["review"]),
        ("question,label,answer", ["question", "answer"]),
    ],
)
def test_columns_of_text_are_found(header: str, texts: list[str], tmp_path: Path):
    cells = [["a"] * len(header.split(",")), ["b"] * len(header.split(","))]
    assert found(tmp_path, header, [",".join(row) for row in cells]).sentence_columns == texts


def test_columns_can_be_named(tmp_path: Path):
    task = found(tmp_path, "a,b,c,stars", ["x,y,z,1", "x,y,z,2"], texts=["c", "a"], label="stars")
    assert (task.sentence_columns, task.label_column) == (["c", "a"], "stars")


@pytest.mark.parametrize(
    ("header", "rows", "names", "expected"),
    [
        ("text,label", ["a,1", "b,1"], {}, "every row has the label '1': a classifier needs two"),
        ("text,label", ["a,0.5", "b,0.5"], {}, "every row has the label '0.5'"),
        ("text,label", ["a,1", "b,"], {}, "line 3 has no label"),
        ("text,label", [], {}, "has no rows"),
        ("text,stars", ["a,1"], {}, "no column 'label' (it has: text, stars)"),
        ("text,label", ["a,1"], {"texts": ["body"]}, "no column 'body' (it has: text, label)"),
        ("a,b,c,label", ["x,y,z,1"], {}, "which column is the text (it has: a, b, c, label)"),
        ("label", ["1", "2"], {}, "which column is the text (it has: label)"),
    ],
)
def test_files_that_are_no_task_end_in_one_line(
    header: str, rows: list[str], names: dict, expected: str, tmp_path: Path
):
    with pytest.raises(UserError) as error:
        found(tmp_path, header, rows, **names)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
