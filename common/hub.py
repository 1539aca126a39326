"""Model folders, from the Hugging Face hub if need be, and transformers without its noise."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import logging

from common.errors import UserError

if TYPE_CHECKING:  # both import torch, which commands that read runs do without
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAFE_WEIGHTS, _PICKLED_WEIGHTS = "*.safetensors", "pytorch_model*.bin"


def model_folder(name: str, option: str) -> Path:
    """The folder of the model ``name``: a folder, or a hub id, which is downloaded; ``option`` is where it was given.

    Raises:
        UserError: there is neither, or the hub can't be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", _SAFE_WEIGHTS]))
        return folder if weight_files(folder) else Path(snapshot_download(name, allow_patterns=[_PICKLED_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise UserError(
            f"{option} {name} is neither a folder here nor a model that the Hugging Face hub gives us"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, or where there are none the PyTorch ones."""
    return sorted(folder.glob(_SAFE_WEIGHTS)) or sorted(folder.glob(_PICKLED_WEIGHTS))


def save(folder: Path, *parts: "PreTrainedModel | PreTrainedTokenizerBase") -> None:
    """Save a model, and a tokenizer beside it, as transformers does, but readable by whom new files are readable."""
    with quiet_transformers():
        for part in parts:
            part.save_pretrained(folder)
    for path in weight_files(folder):
        shutil.copymode(folder / "config.json", path)  # weights come from a temporary file, which is its owner's alone


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its tables of unused and missing weights: what matters of them, we tell."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
