"""The flags of ``python -m finetune train``, as Hugging Face's run_glue names them, and the grid that they ask for.

The grid has one configuration per task: one learning rate, batch size and number of epochs.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import jsonargparse
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from common.cli import command_parser, parse
from common.errors import UserError
from finetune.config import Grid, GridConfig
from finetune.examples import read_split
from finetune.inference import Precision
from finetune.optimizers import Optimizer, parse_optim
from finetune.own_data import find_own_task
from finetune.own_task import OwnTask
from finetune.tasks import Task, find_task, own_task

PROGRAM: Final = "python -m finetune train"
_DEFAULT_LEARNING_RATE: Final = 5e-5
_DEFAULT_STEPS: Final = 500  # between two checkpoints, evaluations, logged losses: run_glue's
_FLAGS_OF: Final = {
    "grids[0].learning_rate": "--learning_rate",
    "grids[0].batch_size": "--per_device_train_batch_size x --gradient_accumulation_steps",
    "grids[0].num_epochs": "--num_train_epochs",
    "max_gradient_norm": "--max_grad_norm",
    "warmup_proportion": "--warmup_ratio",
    "weight_decay": "--weight_decay",
    "max_seq_length": "--max_seq_length",
}
_DESCRIPTION: Final = (
    "Fine-tune a model on tasks of GLUE or on your own data, once or with several seeds, with run_glue's flags."
    " Different from run_glue: the model is evaluated after every epoch, whatever else is asked for; rows of similar"
    " length form a batch and are padded to the longest of them only; the classifier's last layer is always drawn anew;"
    " every trial runs on one device: a batch has per_device_train_batch_size x gradient_accumulation_steps rows on any"
    " machine, several seeds use several devices. The same command again goes on where it was interrupted."
)
# What there is instead of run_glue's other flags.
_INSTEAD: Final = {
    "overwrite_output_dir": "nothing is destroyed here: give another --output_dir, or remove that one yourself",
    "hub_token": "a secret has no place on a command line: run 'hf auth login' once",
    "dataset_name": "give --train_file and --validation_file; own_tasks of run_glue_grid.py take data sets of the hub",
    "dataset_config_name": "give --train_file and --validation_file",
    "pad_to_max_length": "rows are padded to the longest of their batch, always",
    "group_by_length": "rows of similar length form a batch, always",
    "train_sampling_strategy": "rows of similar length form a batch, always",
    "save_strategy": "a checkpoint is written after every epoch and every --save_steps",
    "save_total_limit": "one checkpoint is kept, and none once the trial is done",
    "metric_for_best_model": "--load_best_model_at_end goes by the task's own metric",
    "evaluation_strategy": "it is called --eval_strategy",
    "hub_private_repo": "'python -m finetune publish --private' publishes the output folder",
    "cache_dir": "set HF_HOME in the environment",
    "config_name": "give --model_name_or_path a folder that holds all of the model",
    "tokenizer_name": "give --model_name_or_path a folder that holds all of the model",
    "model_revision": "give --model_name_or_path a folder that holds this revision",
    "logging_dir": "TensorBoard's files are in the output folder's trials/",
    "no_cuda": "set CUDA_VISIBLE_DEVICES to nothing in the environment",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to nothing in the environment",
}


@dataclass(frozen=True)
class Request:
    """What one command asks for."""

    model: str
    """A Hugging Face folder or hub id."""
    output_dir: Path
    glue_dir: Path | None
    """Folder of the official TSV files; None: from the hub."""
    task_names: list[str]
    """None where rows are one's own, or a tuned model tells its task itself."""
    config: GridConfig | None
    """The grid to run; None where the model is taken as it is."""
    evaluates: bool
    """Whether the development split is to be scored with the model as it is."""
    predicts: bool
    """Whether the test set is to be predicted."""
    validation_file: Path | None
    test_file: Path | None
    precision: Precision
    """In which the model is evaluated as it is."""
    max_seq_length: int | None
    max_eval_rows: int | None
    max_predict_rows: int | None
    repo_id: str | None
    """The hub's repository to publish to, without a user where the login tells it; None: nothing is published."""


def read_flags(argv: Sequence[str] | None) -> Request:
    """Parse the flags and check what can be checked without the model.

    Raises:
        UserError: a flag is unknown, contradicts another one or has a wrong value, or own data can't be read.
    """
    parser = _parser()
    flags = parse(parser, _refuse_unknown(parser, argv))
    _check(flags)
    trains = flags.do_train or not (flags.do_eval or flags.do_predict)
    names = _task_names(flags)
    return Request(
        model=flags.model_name_or_path,
        output_dir=Path(flags.output_dir),
        glue_dir=_path(flags.glue_dir),
        task_names=names,
        config=_grid_config(flags, names) if trains else None,
        evaluates=flags.do_eval and not trains,
        predicts=flags.do_predict,
        validation_file=_path(flags.validation_file),
        test_file=_path(flags.test_file),
        precision=_precisions(flags)[0],
        max_seq_length=flags.max_seq_length,
        max_eval_rows=flags.max_eval_samples,
        max_predict_rows=flags.max_predict_samples,
        repo_id=(flags.hub_model_id or Path(flags.output_dir).resolve().name) if flags.push_to_hub else None,
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


# --- the command line ---


def _parser() -> jsonargparse.ArgumentParser:
    parser = command_parser(PROGRAM, _DESCRIPTION)
    parser.usage = "%(prog)s --model_name_or_path MODEL --task_name TASK --output_dir DIR [--flag value ...]"
    for add in _GROUPS:
        add(parser)
    return parser


def _add_folders(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and folders")
    group.add_argument("--model_name_or_path", type=str, required=True, help="Hugging Face folder or hub id")
    group.add_argument("--output_dir", type=str, required=True, help="where all results go, and continue")
    group.add_argument("--glue_dir", type=str, help="folder of GLUE's official TSV files; default: from the hub")


def _add_stages(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to do (default: train and evaluate)")
    _switch(group, "--do_train", "train, and evaluate after every epoch")
    _switch(group, "--do_eval", "without --do_train: score the model as it is on the development split")
    _switch(group, "--do_predict", "predict the test set: the task's, or --test_file")


def _add_data(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--task_name", type=str, nargs="+", metavar="TASK", help="cola sst2 mrpc stsb qqp mnli ...; one or several"
    )
    group.add_argument("--train_file", type=str, help="your own rows instead of a task: .csv, .tsv or .jsonl")
    group.add_argument("--validation_file", type=str, help="your own rows to evaluate on")
    group.add_argument("--test_file", type=str, help="your own rows to predict; they need no labels")
    group.add_argument(
        "--text_column_names",
        type=str,
        nargs="+",
        metavar="COLUMN",
        help="one or two columns of text; default: sentence1 and sentence2, else sentence, else what there is",
    )
    group.add_argument("--label_column_name", type=str, default="label", help="the column of labels or scores")
    group.add_argument("--max_seq_length", type=PositiveInt, help="tokens a row (default: 128, or a tuned model's own)")
    for name, rows in (("train", "training"), ("eval", "development"), ("predict", "test")):
        group.add_argument(f"--max_{name}_samples", type=PositiveInt, help=f"only that many {rows} rows, the first")


def _add_training(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--per_device_train_batch_size", type=PositiveInt, default=8, help="rows a forward pass")
    group.add_argument(
        "--gradient_accumulation_steps", type=PositiveInt, default=1, help="forward passes an optimizer step"
    )
    group.add_argument(
        "--per_device_eval_batch_size",
        type=PositiveInt,
        help="accepted, without effect: 64 rows are evaluated at a time, and scores don't depend on it",
    )
    group.add_argument("--num_train_epochs", type=PositiveFloat, default=3.0, help="passes over the rows; 0.5 is half")
    group.add_argument("--max_steps", type=int, default=-1, help="optimizer steps, instead of epochs; -1: by epochs")
    group.add_argument("--seed", type=NonNegativeInt, default=42, help="of the head, the rows' order and dropout")
    group.add_argument("--num_seeds", type=PositiveInt, default=1, help="trials, with seed, seed + 1, ...")
    _switch(group, "--fp16", "matrix products in fp16, on a GPU")
    _switch(group, "--bf16", "matrix products in bf16")
    group.add_argument(
        "--precision", type=Precision, nargs="+", help="fp32 (default), bf16, fp16; several are compared"
    )
    _switch(group, "--load_best_model_at_end", "the best epoch's score counts, not the last one's (which flatters)")


def _add_schedule(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning rate")
    group.add_argument(
        "--learning_rate", type=PositiveFloat, help=f"the peak (default: {_DEFAULT_LEARNING_RATE:g}, or optim_args' lr)"
    )
    group.add_argument(
        "--lr_scheduler_type", type=Literal["linear", "cosine", "constant"], default="linear", help="after the warmup"
    )
    group.add_argument("--warmup_steps", type=NonNegativeInt, default=0, help="optimizer steps; before warmup_ratio")
    group.add_argument("--warmup_ratio", type=NonNegativeFloat, default=0.0, help="warmup's share of all steps")


def _add_optimizer(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optim", type=str, default="adamw_torch", help="adamw_torch or MFAC")
    group.add_argument("--optim_args", type=str, help='such as \'{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}\'')
    group.add_argument("--weight_decay", type=NonNegativeFloat, default=0.0, help="not of biases and LayerNorms")
    group.add_argument("--adam_beta1", type=float, help="default: 0.9")
    group.add_argument("--adam_beta2", type=float, help="default: 0.999")
    group.add_argument("--adam_epsilon", type=float, help="default: 1e-8")
    group.add_argument("--max_grad_norm", type=NonNegativeFloat, default=1.0, help="gradients are clipped to; 0: not")


def _add_times(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluations, checkpoints, logs")
    group.add_argument("--eval_steps", type=PositiveInt, help="optimizer steps between evaluations within an epoch")
    group.add_argument(
        "--eval_strategy",
        type=Literal["no", "epoch", "steps"],
        help="steps: every eval_steps too; after each epoch in any case (default: steps if eval_steps is given)",
    )
    group.add_argument("--save_steps", type=PositiveInt, default=_DEFAULT_STEPS, help="steps between checkpoints")
    group.add_argument("--logging_steps", type=PositiveInt, default=_DEFAULT_STEPS, help="steps between logged losses")
    group.add_argument(
        "--report_to", type=Literal["tensorboard", "all", "none"], default="tensorboard", help="none: no event files"
    )
    group.add_argument(
        "--resume_from_checkpoint", type=str, help="accepted, without effect: the same command goes on by itself"
    )


def _add_hub(parser: jsonargparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hugging Face hub")
    _switch(group, "--push_to_hub", "publish the model in the end; needs 'hf auth login' before")
    group.add_argument("--hub_model_id", type=str, help="user/name to publish as; default: the output folder's name")


def _switch(group: Any, name: str, text: str) -> None:
    """A flag that is given alone, or with true or false, as transformers' own are."""
    group.add_argument(name, type=bool, nargs="?", const=True, default=False, help=text)


_GROUPS: Final = (
    _add_folders,
    _add_stages,
    _add_data,
    _add_training,
    _add_schedule,
    _add_optimizer,
    _add_times,
    _add_hub,
)


def _refuse_unknown(parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None) -> Sequence[str] | None:
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    names = [argument[2:].split("=")[0] for argument in argv or () if argument.startswith("--")]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            hint = _INSTEAD.get(name, f"the nearest one is --{nearest}; '{PROGRAM} --help' tells all")
            raise UserError(f"there is no --{name} here: {hint}")
    return argv


# --- what the flags mean together ---


def _check(flags: jsonargparse.Namespace) -> None:
    trains = flags.do_train or not (flags.do_eval or flags.do_predict)
    own = [name for name in ("train_file", "validation_file") if flags[name]]
    problem = None
    if flags.fp16 + flags.bf16 + bool(flags.precision) > 1:
        problem = "--fp16, --bf16 and --precision contradict each other: give one; --precision takes several"
    elif flags.task_name and (own or flags.test_file):
        problem = f"--task_name and --{(own or ['test_file'])[0]} contradict each other: a task has its own rows"
    elif trains and not flags.task_name and len(own) < 2:
        problem = "give --task_name, or your own rows by --train_file and --validation_file"
    elif flags.train_file and flags.train_file == flags.validation_file:
        problem = "--train_file and --validation_file are the same: a score on rows of training means nothing"
    elif not trains and flags.train_file:
        problem = "--train_file is for training: add --do_train, or leave it out"
    elif flags.task_name and (flags.text_column_names or flags.label_column_name != "label"):
        problem = "--text_column_names and --label_column_name are for your own rows: a task has its own columns"
    elif len(set(flags.text_column_names or ())) < len(flags.text_column_names or ()):
        problem = f"--text_column_names names a column twice: {' '.join(flags.text_column_names)}"
    elif flags.eval_strategy == "steps" and not flags.eval_steps:
        problem = "--eval_strategy steps needs --eval_steps"
    elif flags.num_train_epochs == math.inf:
        problem = "--num_train_epochs is infinite: training has an end"
    elif flags.push_to_hub and (not trains or len(flags.task_name or ()) > 1):
        problem = "--push_to_hub publishes what one task's training brings: train, one task at a time"
    elif flags.hub_model_id and not flags.push_to_hub:
        problem = "--hub_model_id is where --push_to_hub publishes: give both"
    if problem:
        raise UserError(problem)


def _task_names(flags: jsonargparse.Namespace) -> list[str]:
    names = [find_task(name.lower()).task_name for name in flags.task_name or ()]
    if len(set(names)) < len(names):
        raise UserError(f"--task_name has a task twice: {' '.join(names)}")
    return names


def _grid_config(flags: jsonargparse.Namespace, names: Sequence[str]) -> GridConfig:
    own = [_own_task(flags)] if flags.train_file else []
    tasks = [own_task(task) for task in own] or [find_task(name) for name in names]
    optimizer, learning_rate = _optimizer(flags)
    batch_size = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
    lengths = {task.task_name: _length(flags, task, batch_size) for task in tasks}
    if len({length.max_steps for length in lengths.values()}) > 1:
        raise UserError(
            f"--num_train_epochs {flags.num_train_epochs:g} ends within an epoch, which is another step for each task:"
            " give one task at a time"
        )
    try:
        return GridConfig(
            grids=[
                Grid([name], [learning_rate], [batch_size], [length.num_epochs], optimizer)
                for name, length in lengths.items()
            ],
            seeds=list(range(flags.seed, flags.seed + flags.num_seeds)),
            own_tasks=own,
            max_seq_length=flags.max_seq_length or 128,
            max_train_rows=dict.fromkeys(lengths, flags.max_train_samples) if flags.max_train_samples else {},
            max_eval_rows=dict.fromkeys(lengths, flags.max_eval_samples) if flags.max_eval_samples else {},
            weight_decay=flags.weight_decay,
            warmup_proportion=flags.warmup_ratio,
            warmup_steps=flags.warmup_steps or None,
            lr_schedule=flags.lr_scheduler_type,
            max_gradient_norm=flags.max_grad_norm,
            gradient_accumulation_steps=flags.gradient_accumulation_steps,
            max_steps=lengths[tasks[0].task_name].max_steps,
            score_epoch="best" if flags.load_best_model_at_end else "last",
            eval_steps=flags.eval_steps if flags.eval_strategy in (None, "steps") else None,
            save_steps=flags.save_steps,
            logging_steps=None if flags.report_to == "none" else flags.logging_steps,
            precision=_precisions(flags),
        )
    except ValueError as error:
        raise UserError(_in_flags(str(error))) from None


def _in_flags(problem: str) -> str:
    """What a configuration's check says, in the words of the command line."""
    for name, flag in _FLAGS_OF.items():
        problem = problem.replace(name, flag)
    return problem


def _own_task(flags: jsonargparse.Namespace) -> OwnTask:
    return find_own_task(
        Path(flags.train_file), Path(flags.validation_file), flags.text_column_names, flags.label_column_name
    )


def _precisions(flags: jsonargparse.Namespace) -> list[Precision]:
    return ["fp16"] * flags.fp16 or ["bf16"] * flags.bf16 or flags.precision or ["fp32"]


def _optimizer(flags: jsonargparse.Namespace) -> tuple[Optimizer, float]:
    """The optimizer and its peak learning rate, which either flag may give."""
    optimizer, learning_rate = parse_optim(flags.optim, flags.optim_args)
    given = flags.learning_rate
    if None not in (given, learning_rate) and given != learning_rate:
        raise UserError(f"--learning_rate {given:g} contradicts --optim_args' lr {learning_rate:g}: give one")
    of_adam = {name: flags[name] for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if flags[name] is not None}
    try:
        return replace(optimizer, **of_adam), learning_rate or given or _DEFAULT_LEARNING_RATE
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class _Length:
    """How long a trial is."""

    num_epochs: int
    """Epochs begun."""
    max_steps: int | None
    """Where it ends within the last of them."""


def _length(flags: jsonargparse.Namespace, task: Task, batch_size: int) -> _Length:
    """As run_glue counts: ``max_steps`` before epochs, and a share of an epoch in whole steps, rounded up."""
    if flags.max_steps <= 0 and flags.num_train_epochs.is_integer():
        return _Length(int(flags.num_train_epochs), None)
    num_rows = len(read_split(task, "train", _path(flags.glue_dir)))
    steps_per_epoch = math.ceil(min(num_rows, flags.max_train_samples or num_rows) / batch_size)
    max_steps = flags.max_steps if flags.max_steps > 0 else math.ceil(flags.num_train_epochs * steps_per_epoch)
    return _Length(math.ceil(max_steps / steps_per_epoch), max_steps)
