"""A pretrained encoder in a Hugging Face folder, and the classifiers that trials start from."""

import hashlib
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import UserError
from common.folders import sha256_of_file
from common.hub import model_folder, quiet_transformers, weight_files
from finetune.heads import read_pruned_heads, remove_recorded_heads
from finetune.quantization import is_quantized
from finetune.tasks import Task

Initialization = Literal["pretrained", "random", "mnli"]
"""``mnli``: from the encoder that MNLI's tuned model has."""

_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def find_model(model: str, option: str = "--model") -> Path:
    """The folder of ``model``: a Hugging Face folder, or a hub id, which is downloaded.

    ``option`` is where it was given.

    Raises:
        UserError: configuration, weights or tokenizer are missing, or the hub cannot be reached.
    """
    folder = model_folder(model, option)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: {option} takes a Hugging Face folder, such as R/hf")
    if not weight_files(folder):
        raise UserError(f"{folder} has no weights (model.safetensors): the export is not complete")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer ({' or '.join(_TOKENIZER_FILES[:2])}): put the model's own there")
    return folder


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
    read_encoder_weights(folder)
    classifier, _ = read_classifier(folder)
    config = classifier.config
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no padding token, so this is no BERT-style encoder")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model knows {config.vocab_size}")
    longest = getattr(config, "max_position_embeddings", max_seq_length)
    if max_seq_length > longest:
        raise UserError(f"max_seq_length is {max_seq_length}, but {folder} has positions for {longest} tokens")
    token_id = next(index for index in range(len(tokenizer)) if index not in tokenizer.all_special_ids)
    try:
        with torch.inference_mode():
            classifier.eval()(input_ids=torch.full((1, max_seq_length), token_id))
    except (IndexError, RuntimeError) as error:  # RoBERTa has two positions more than it can use
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} can't take max_seq_length {max_seq_length} ({reason}): lower it") from None


def model_fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of what a trial takes from the folder: weights, configuration, tokenizer."""
    files = {
        "model weights": weight_files(folder),
        "model configuration": [folder / "config.json"],
        "tokenizer": [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()],
        "tokenizer configuration": [path for path in [folder / "tokenizer_config.json"] if path.is_file()],
    }
    return {part: _sha256(paths) for part, paths in files.items()}


def _sha256(paths: list[Path]) -> str:
    """Of one file its own; of several that of their checksums."""
    checksums = [sha256_of_file(path) for path in paths]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


class Encoder:
    """Weights read once, from which any number of classifiers start, each with a freshly drawn head.

    From a pruned folder they start without the heads that it lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Read here and not when first needed: reading draws random numbers, which would then be missing from one trial.
        self._weights = read_encoder_weights(folder)

    @property
    def num_parameters(self) -> int:
        """Of the encoder, without a head."""
        return sum(weight.numel() for weight in self._weights.values())

    def new_classifier(self, task: Task, initialization: Initialization, device: torch.device) -> PreTrainedModel:
        """A float32 classifier for ``task`` on ``device``; torch's random state decides what is not pretrained.

        ``random`` has the same architecture, and no pretrained weight at all.
        """
        config = AutoConfig.from_pretrained(self.folder, **_head_config(task))
        with device:
            classifier = AutoModelForSequenceClassification.from_config(config)
        remove_recorded_heads(classifier, self.folder)
        if initialization != "random":
            classifier.load_state_dict(self._weights, strict=False)
        return classifier.float()


def _head_config(task: Task) -> dict[str, Any]:
    """What the saved model tells others of its outputs."""
    names = dict(enumerate(task.output_names))
    kind = "single_label_classification" if task.labels else "regression"
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}, "problem_type": kind}


def read_encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder holds of a classifier, but for the layers that classify, which every trial draws anew.

    Raises:
        UserError: the files are damaged, or parts of the encoder itself are missing, so that it would not be
            pretrained.
    """
    classifier, missing = read_classifier(folder)
    prefix = f"{classifier.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(prefix) and "pooler" not in key)
    if lost:
        raise UserError(f"{folder} lacks {len(lost)} weights of its own encoder (such as {lost[0]})")
    weights = classifier.state_dict()
    # ModernBERT's "head" is what other models have as a pooler: pretrained, and in front of what classifies.
    return {key: weights[key] for key in weights if key.startswith((prefix, "head.")) and key not in missing}


def read_classifier(folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """A classifier with all weights of the folder, and the names of those that are missing there and were drawn.

    Raises:
        UserError: configuration or weights are damaged, do not fit each other, or are quantised.
    """
    refuse_quantized(folder)
    try:
        with quiet_transformers():
            return _read_pruned(folder) if read_pruned_heads(folder) else _read_whole(folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} does not load: {str(error).splitlines()[0]}") from None


def refuse_quantized(folder: Path) -> None:
    """Refuse a model whose weights are integers, for a step that trains or changes them.

    Raises:
        UserError: it is one.
    """
    if is_quantized(folder):
        raise UserError(f"{folder} is quantised, and integers are not trained: take the model that it was made from")


def _read_whole(folder: Path) -> tuple[PreTrainedModel, set[str]]:
    classifier, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    return classifier, set(info["missing_keys"])


def _read_pruned(folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """transformers has no smaller form: the full one is made, cut, and filled."""
    config = AutoConfig.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_config(config)
    remove_recorded_heads(classifier, folder)
    weights = {name: weight for path in weight_files(folder) for name, weight in load_file(path).items()}
    missing = classifier.load_state_dict(weights, strict=False).missing_keys
    return classifier.eval(), set(missing)
