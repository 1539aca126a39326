"""A pretrained encoder in a Hugging Face folder, and the classifiers that trials start from."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from common.errors import UserError
from common.folders import sha256_of_file
from finetune.tasks import Task

Initialization = Literal["pretrained", "random"]

_WEIGHT_PATTERNS: Final = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def find_model(model: str) -> Path:
    """The folder of ``model``: a Hugging Face folder, or a hub id, which is downloaded.

    Raises:
        UserError: configuration, weights or tokenizer are missing, or the hub cannot be reached.
    """
    folder = Path(model) if Path(model).is_dir() else _download(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: --model takes a Hugging Face folder, such as R/hf")
    if not _weight_files(folder):
        raise UserError(f"{folder} has no weights (model.safetensors): the export is not complete")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer ({' or '.join(_TOKENIZER_FILES[:2])}): put the model's own there")
    return folder


def _download(model: str) -> Path:
    try:
        folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", _WEIGHT_PATTERNS[0]]))
        if not _weight_files(folder):
            folder = Path(snapshot_download(model, allow_patterns=[_WEIGHT_PATTERNS[1]]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise UserError(
            f"--model {model} is neither a folder here nor a model that the Hugging Face hub gives us"
        ) from None
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, or where there are none the PyTorch ones."""
    return next((files for pattern in _WEIGHT_PATTERNS if (files := sorted(folder.glob(pattern)))), [])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        UserError: its files are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {folder} does not load: {str(error).splitlines()[0]}") from None


def check_model(folder: Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    """Load the model once, so that what is wrong with it shows before any work.

    Raises:
        UserError: configuration or weights are damaged, or do not fit the tokenizer or ``max_seq_length``.
    """
    _read_pretrained_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model knows {config.vocab_size}")
    longest = getattr(config, "max_position_embeddings", max_seq_length)
    if max_seq_length > longest:
        raise UserError(f"max_seq_length is {max_seq_length}, but {folder} has positions for {longest} tokens")


def model_fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of what a trial takes from the folder: weights, configuration, tokenizer."""
    files = {
        "model weights": _weight_files(folder),
        "model configuration": [folder / "config.json"],
        "tokenizer": [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()],
    }
    return {part: _sha256(paths) for part, paths in files.items()}


def _sha256(paths: list[Path]) -> str:
    return hashlib.sha256("".join(sha256_of_file(path) for path in paths).encode()).hexdigest()


class Encoder:
    """Weights read once, from which any number of classifiers start, each with a freshly drawn head."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Read here and not when first needed: reading draws random numbers, which would then be missing from one trial.
        self._pretrained_weights = _read_pretrained_weights(folder)

    def new_classifier(self, task: Task, initialization: Initialization, device: torch.device) -> PreTrainedModel:
        """A classifier for ``task`` on ``device``; torch's random state decides what is not pretrained.

        ``random`` has the same architecture, and no pretrained weight at all.
        """
        config = AutoConfig.from_pretrained(self.folder, num_labels=task.num_labels)
        with device:
            classifier = AutoModelForSequenceClassification.from_config(config)
        if initialization == "pretrained":
            classifier.load_state_dict(self._pretrained_weights, strict=False)
        return classifier.float()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its warning that the head is new, which is what we want, and a progress bar per worker."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def _read_pretrained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder holds of a classifier: everything but the head.

    Raises:
        UserError: the files are damaged, or parts of the encoder itself are missing, so that it would not be
            pretrained.
    """
    try:
        with _quiet_transformers():
            classifier, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"the model in {folder} does not load: {str(error).splitlines()[0]}") from None
    missing = set(info["missing_keys"])
    prefix = f"{classifier.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(prefix) and "pooler" not in key)
    if lost:
        raise UserError(f"{folder} lacks {len(lost)} weights of its own encoder (such as {lost[0]})")
    # A head of another task is left behind too: every trial draws its own.
    weights = classifier.state_dict()
    return {key: weights[key] for key in weights if key.startswith(prefix) and key not in missing}
