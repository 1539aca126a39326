"""From a task's files to batches: read and check the rows, tokenise them once, serve them by length.

All workers share one set of token arrays through memory-mapped files.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.folders import atomic_path, read_json, write_json
from finetune.tasks import HUB_DATASET, Task

BATCHES_PER_WINDOW: Final = 50  # as transformers' length-grouped sampler: large enough to save padding, still random
_SUMMARY_FILE: Final = "summary.json"


@dataclass(frozen=True)
class Examples:
    """The rows of one split as read: texts and, in the same order, labels."""

    sentences: tuple[list[str], ...]
    """One list per sentence column."""
    labels: list[int] | list[float]
    """Class indices, or scores."""


def read_task(task: Task, glue_dir: Path | None) -> dict[str, Examples]:
    """Read and check every split that a trial of ``task`` needs.

    Args:
        task: what to read.
        glue_dir: folder that holds the task's folder of official TSV files; None reads from the Hugging Face hub.

    Raises:
        UserError: a file, column or label is missing or wrong, or the hub cannot be reached.
    """
    if glue_dir is None:
        return {split: _read_hub(task, split) for split in task.splits}
    return {split: read_tsv(task, glue_dir / task.folder / f"{split}.tsv") for split in task.splits}


def read_tsv(task: Task, path: Path) -> Examples:
    """Read an official TSV file: tab-separated, one row a line, quotes are ordinary characters.

    Raises:
        UserError: the file is missing, empty, or has other columns or labels than the task.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: {task.task_name} needs it; give --glue_dir a folder that has it")
    # Split on "\n" alone: the text itself holds other characters that Python counts as line ends.
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line.split("\t")) for number, line in enumerate(lines, start=1) if line]
    columns = task.columns_without_header or (numbered.pop(0)[1] if numbered else [])
    wanted = [*task.sentence_columns, task.label_column]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(f"{path} has no column '{missing[0]}' (it has: {', '.join(columns)}), which {task.title} needs")
    rows = [(number, row) for number, row in numbered if _is_whole(task, path, number, row, len(columns))]
    if not rows:
        raise UserError(f"{path} has no rows")
    *sentences, labels = ([row[columns.index(name)] for _, row in rows] for name in wanted)
    indices = [_label(task, label, f"{path}, line {number}") for (number, _), label in zip(rows, labels, strict=True)]
    return Examples(tuple(sentences), indices)


def _is_whole(task: Task, path: Path, number: int, row: list[str], num_columns: int) -> bool:
    if len(row) == num_columns:
        return True
    if task.skip_broken_rows:
        return False
    raise UserError(f"{path}, line {number} has {len(row)} columns instead of {num_columns}: not {task.title}'s layout")


def _label(task: Task, label: str, where: str) -> int | float:
    if task.labels is not None:
        if label not in task.labels:
            raise UserError(f"{where}: label '{label}' is not one of {task.title}'s ({', '.join(task.labels)})")
        return task.labels.index(label)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: '{label}' is not a score")
    return score


def _read_hub(task: Task, split: str) -> Examples:
    if task.synthetic:
        raise UserError(f"{task.task_name} is synthetic and not on the hub: give --glue_dir the folder made for it")
    import datasets  # slow to import, and only needed without --glue_dir

    try:
        rows = datasets.load_dataset(HUB_DATASET, task.hub_config, split=split.replace("dev", "validation"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{HUB_DATASET} ({task.hub_config}) cannot be loaded ({reason}): give --glue_dir") from None
    columns = task.hub_sentence_columns or task.sentence_columns
    return Examples(tuple(list(rows[name]) for name in columns), list(rows["label"]))


def data_sha256(task_data: dict[str, Examples]) -> str:
    """A checksum of all texts and labels of a task, the same for the same rows from files and from the hub."""
    digest = hashlib.sha256()
    for split, examples in task_data.items():
        digest.update(json.dumps([split, asdict(examples)]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenizedSplit:
    """The rows of one split as flat arrays; row i is ``input_ids[offsets[i]:offsets[i + 1]]``."""

    input_ids: np.ndarray
    """int32 [tokens], [CLS] and [SEP] included."""
    token_type_ids: np.ndarray | None
    """int32 [tokens]; None for models that take none."""
    offsets: np.ndarray
    """int64 [rows + 1]."""
    labels: np.ndarray
    """int32 class indices or float32 scores [rows]."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [rows]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenizedTask:
    """A task's splits, ready for batches."""

    splits: dict[str, TokenizedSplit]
    pad_token_id: int


def tokenize_task(
    task_data: dict[str, Examples],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    folder: Path,
) -> None:
    """Tokenise all splits into ``folder``, unless it is there already.

    Pairs longer than ``max_seq_length`` lose tokens from the longer text first.
    """
    if folder.exists():
        return
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for split, examples in task_data.items():
            tokenized = _tokenize(examples, tokenizer, max_seq_length)
            for name, array in vars(tokenized).items():
                if array is not None:
                    np.save(temporary / f"{split}.{name}.npy", array, allow_pickle=False)
        write_json(temporary / _SUMMARY_FILE, {"splits": list(task_data), "pad_token_id": tokenizer.pad_token_id})


def _tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> TokenizedSplit:
    encoded = tokenizer(
        *examples.sentences, truncation="longest_first", max_length=max_seq_length, return_attention_mask=False
    )
    rows = encoded["input_ids"]
    is_score = isinstance(examples.labels[0], float)
    return TokenizedSplit(
        input_ids=_flat(rows),
        token_type_ids=_flat(encoded["token_type_ids"]) if "token_type_ids" in encoded else None,
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        labels=np.asarray(examples.labels, dtype=np.float32 if is_score else np.int32),
    )


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])


def load_tokenized(folder: Path) -> TokenizedTask:
    """Memory-map what :func:`tokenize_task` wrote."""

    def array(split: str, name: str) -> np.ndarray | None:
        path = folder / f"{split}.{name}.npy"
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None

    summary = read_json(folder / _SUMMARY_FILE, "the tokenised task")
    names = TokenizedSplit.__dataclass_fields__
    splits = {split: TokenizedSplit(**{name: array(split, name) for name in names}) for split in summary["splits"]}
    return TokenizedTask(splits, summary["pad_token_id"])


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded to the longest of them."""

    rows: np.ndarray
    """Their places in the split, [batch]."""
    inputs: dict[str, torch.Tensor]
    """The model's keyword arguments, int64 [batch, longest]."""
    labels: torch.Tensor
    """int64 class indices or float32 scores, [batch]."""


def training_batches(data: TokenizedSplit, batch_size: int, pad_token_id: int, seed: list[int]) -> Iterator[Batch]:
    """Every row once, in an order that follows from ``seed``; one batch may be smaller than ``batch_size``.

    Rows are shuffled, sorted by length within windows, and the resulting batches are shuffled.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(data))
    lengths = data.lengths
    batches = []
    window_size = BATCHES_PER_WINDOW * batch_size
    for start in range(0, len(order), window_size):
        window = order[start : start + window_size]
        batches += _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
    for index in random.permutation(len(batches)):
        yield _pad(data, batches[index], pad_token_id)


def evaluation_batches(data: TokenizedSplit, batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Every row once, by length."""
    for rows in _cut(np.argsort(data.lengths, kind="stable"), batch_size):
        yield _pad(data, rows, pad_token_id)


def num_batches(data: TokenizedSplit, batch_size: int) -> int:
    """Batches of one pass."""
    return math.ceil(len(data) / batch_size)


def _cut(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _pad(data: TokenizedSplit, rows: np.ndarray, pad_token_id: int) -> Batch:
    starts = data.offsets[rows]
    lengths = data.offsets[rows + 1] - starts
    columns = np.arange(lengths.max())
    is_token = columns < lengths[:, None]
    # Places past a row's end are clipped into the array and then overwritten with padding.
    places = np.minimum(starts[:, None] + columns, len(data.input_ids) - 1)
    inputs = {
        "input_ids": np.where(is_token, data.input_ids[places], pad_token_id),
        "attention_mask": is_token,
    }
    if data.token_type_ids is not None:
        inputs["token_type_ids"] = np.where(is_token, data.token_type_ids[places], 0)
    labels = torch.from_numpy(data.labels[rows])
    return Batch(
        rows=rows,
        inputs={name: torch.from_numpy(array.astype(np.int64)) for name, array in inputs.items()},
        labels=labels if labels.is_floating_point() else labels.long(),
    )
