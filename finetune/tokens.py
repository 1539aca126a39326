"""Each split tokenised once, kept as flat arrays that all workers map into memory."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.folders import atomic_path, file_lock, is_undamaged, read_json, sha256_of_file, write_json
from finetune.examples import Examples
from finetune.tasks import Task

_FORMAT: Final = 1  # of the folder; another one makes all of them again
_ROWS_AT_ONCE: Final = 8192  # Python's lists of token ids take ten times the memory of arrays
_SUMMARY_FILE: Final = "summary.json"
_LOCK_FILE: Final = ".tokenize.lock"


@dataclass(frozen=True)
class TokenizedSplit:
    """The rows of one split as flat arrays; row i is ``input_ids[offsets[i]:offsets[i + 1]]``."""

    input_ids: np.ndarray
    """int32 [tokens], special tokens included."""
    token_type_ids: np.ndarray | None
    """int32 [tokens]; None for models that take none."""
    offsets: np.ndarray
    """int64 [rows + 1]."""
    labels: np.ndarray | None
    """int32 class indices or float32 scores [rows]; None for a test split."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return int(self.offsets[-1])


def tokenize_split(
    examples: Examples,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_sha256: str,
    max_seq_length: int,
    cache_dir: Path,
) -> Path:
    """Tokenise a split into a folder of ``cache_dir``, unless it is there already, whole and undamaged.

    Pairs longer than ``max_seq_length`` tokens lose tokens from the longer text first. Several processes may ask for
    the same folder: one makes it, the others wait.

    Returns:
        The folder, for :func:`load_tokens`. Its name follows from the tokenizer, the rows and the length.

    Raises:
        UserError: the tokenizer cannot pad.
    """
    _require_padding(tokenizer)
    key = json.dumps([_FORMAT, tokenizer_sha256, examples.sha256, max_seq_length])
    folder = cache_dir / f"{task.task_name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(cache_dir / _LOCK_FILE):
        if not _is_whole(folder):
            _write(folder, _tokenize(examples, tokenizer, max_seq_length), tokenizer.pad_token_id)
    return folder


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> TokenizedSplit:
    """The same in memory, for rows that are needed once.

    Raises:
        UserError: the tokenizer cannot pad.
    """
    _require_padding(tokenizer)
    arrays = _tokenize(examples, tokenizer, max_seq_length)
    absent = dict.fromkeys(("token_type_ids", "labels"))
    return TokenizedSplit(**{**absent, **arrays}, pad_token_id=tokenizer.pad_token_id)


def _require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise UserError("the model's tokenizer has no padding token: take another model, or give its tokenizer one")


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / _SUMMARY_FILE, "the tokenised rows")["files"]
        return all(is_undamaged(folder / name, sha256) for name, sha256 in files.items())
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return False


def _write(folder: Path, arrays: Mapping[str, np.ndarray], pad_token_id: int) -> None:
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        files = {}
        for name, array in arrays.items():
            path = temporary / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = sha256_of_file(path)
        write_json(temporary / _SUMMARY_FILE, {"pad_token_id": pad_token_id, "files": files})


def _tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> dict[str, np.ndarray]:
    """The arrays of :class:`TokenizedSplit` by name."""
    chunks: dict[str, list[np.ndarray]] = {}
    lengths = []
    for start in range(0, len(examples), _ROWS_AT_ONCE):
        encoded = tokenizer(
            *(texts[start : start + _ROWS_AT_ONCE] for texts in examples.sentences),
            truncation="longest_first",
            max_length=max_seq_length,
            return_attention_mask=False,
        )
        lengths += map(len, encoded["input_ids"])
        for name, rows in encoded.items():
            chunks.setdefault(name, []).append(_flat(rows))
    arrays = {name: np.concatenate(chunks[name]) for name in ("input_ids", "token_type_ids") if name in chunks}
    arrays["offsets"] = np.cumsum([0, *lengths], dtype=np.int64)
    if examples.labels is not None:
        is_score = isinstance(examples.labels[0], float)
        arrays["labels"] = np.asarray(examples.labels, dtype=np.float32 if is_score else np.int32)
    return arrays


def _flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32)


def load_tokens(folder: Path) -> TokenizedSplit:
    """Memory-map what :func:`tokenize_split` wrote."""

    def array(name: str) -> np.ndarray | None:
        path = folder / f"{name}.npy"
        return np.load(path, mmap_mode="c", allow_pickle=False) if path.exists() else None

    arrays = {name: array(name) for name in ("input_ids", "token_type_ids", "offsets", "labels")}
    summary = read_json(folder / _SUMMARY_FILE, "run the grid again, which tokenises again")
    return TokenizedSplit(**arrays, pad_token_id=summary["pad_token_id"])


def select_rows(split: TokenizedSplit, rows: np.ndarray) -> TokenizedSplit:
    """A split of these rows alone, in this order.

    Args:
        split: of all rows.
        rows: places in it, int64 [selected].
    """
    lengths = split.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(split.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return TokenizedSplit(
        input_ids=split.input_ids[places],
        token_type_ids=None if split.token_type_ids is None else split.token_type_ids[places],
        offsets=offsets,
        labels=None if split.labels is None else split.labels[rows],
        pad_token_id=split.pad_token_id,
    )


def typical_rows(split: TokenizedSplit, num_rows: int) -> TokenizedSplit:
    """So many rows of about the median length, for measuring speed; repeated, where there are fewer."""
    by_length = np.argsort(split.lengths, kind="stable")
    start = max(0, (len(by_length) - num_rows) // 2)
    return select_rows(split, np.resize(by_length[start : start + num_rows], num_rows))
