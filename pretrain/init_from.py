"""``init_from``: start from a model that Hugging Face's programs have written, instead of from random weights."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from common.errors import UserError
from common.hub import model_folder, quiet_transformers, weight_files
from data_prep.shards import Manifest
from pretrain.architecture import PRESETS, Architecture, ModelConfig
from pretrain.hugging_face import (
    LAYER_NORMS,
    MODEL_CLASSES,
    architecture_of,
    check_parity,
    first_line,
    from_hugging_face,
    hugging_face_names,
    load_tokenizer,
)
from pretrain.model import MaskedLanguageModel

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")  # without any, transformers would make up an empty tokenizer
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_DECODER, _EMBEDDINGS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
# What transformers and the formats below it raise for files that are not what they should be.
_FILE_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, ImportError)
_FORMAT_ERRORS = (pickle.UnpicklingError, SafetensorError, StrictDataclassError)


def resolve_from(name: str, manifest: Manifest, model_config: ModelConfig) -> Architecture:
    """The architecture of the model ``name``, a Hugging Face folder or a hub id, with the dropouts of ``model_config``.

    What else ``model_config`` sets to another value than its default must agree with that model.

    Raises:
        UserError: there is no such model, it is no encoder like ours, or doesn't fit ``model_config`` or the data.
    """
    folder = _find(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*_FILE_ERRORS, *_FORMAT_ERRORS) as error:
        raise UserError(f"init_from {name}: its config.json does not load ({first_line(error)})") from None
    _check_kind(name, config)
    architecture = architecture_of(config)
    _check_agrees(name, architecture, model_config)
    _check_fits_data(name, architecture, folder, manifest)
    return replace(architecture, **{dropout: getattr(model_config, dropout) for dropout in _DROPOUTS})


def load_pretrained(model: MaskedLanguageModel, name: str) -> str:
    """Put the weights of the model ``name`` into ``model``, whose architecture comes from :func:`resolve_from`.

    A masked language modelling head that ``name`` lacks stays as ``model`` has it. torch's random state stays as it is.

    Returns:
        A line that says what was done.

    Raises:
        UserError: the weights are damaged, not finite, of other sizes or incomplete.
        RuntimeError: the logits of both models differ, which is a bug.
    """
    with torch.random.fork_rng(devices=[]):
        reference, missing = _read(name, model.architecture.layer_norm)
        pretrained = from_hugging_face(reference, model.architecture)
    check_parity(pretrained, reference)
    weights = {
        our_name: tensor
        for our_name, tensor in pretrained.state_dict().items()
        if missing.isdisjoint(hugging_face_names(our_name, model.architecture.layer_norm))
    }
    model.load_state_dict(weights, strict=False)
    head = "; it has no masked language modelling head, which starts fresh" if missing else ""
    return f"starting from {name} ({reference.config.model_type}){head}"


def _find(name: str) -> Path:
    """The folder of a model: its own, or where the hub's files are kept."""
    folder = model_folder(name, "init_from")
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from {name} has no config.json: give a Hugging Face folder or a hub id")
    if not weight_files(folder):
        raise UserError(f"init_from {name} has no weights (model.safetensors or pytorch_model.bin)")
    return folder


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    """Refuse what our encoder can't compute."""
    if config.model_type not in LAYER_NORMS:
        raise UserError(
            f"init_from {name} is of type '{config.model_type}': only {' and '.join(sorted(LAYER_NORMS))} can be"
        )
    differences = {
        f"hidden_act '{config.hidden_act}', ours is the exact 'gelu'": config.hidden_act != "gelu",
        "relative positions, ours are absolute": getattr(config, "position_embedding_type", "absolute") != "absolute",
        "a decoder's attention, ours is an encoder's": config.is_decoder or config.add_cross_attention,
    }
    for difference, is_there in differences.items():
        if is_there:
            raise UserError(f"init_from {name} has {difference}: it can't be trained on here")


def _check_agrees(name: str, architecture: Architecture, model_config: ModelConfig) -> None:
    """Refuse what the user set otherwise; a value that is the default may be nobody's wish."""
    default, given = asdict(ModelConfig()), asdict(model_config)
    wanted = {key: value for key, value in given.items() if value != default[key] and key not in _DROPOUTS}
    if "preset" in wanted:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        wanted = dict(zip(sizes, PRESETS[wanted.pop("preset")], strict=True)) | wanted
    for key, value in wanted.items():
        if value != (actual := getattr(architecture, key)):
            raise UserError(f"init_from {name} has {key} {actual}, model has {value}: leave it out of model")


def _check_fits_data(name: str, architecture: Architecture, folder: Path, manifest: Manifest) -> None:
    longest = architecture.max_position_embeddings
    if manifest.max_seq_length > longest:
        raise UserError(
            f"init_from {name} has positions for {longest} tokens, the data's max_seq_length is "
            f"{manifest.max_seq_length}: build the data with at most {longest}"
        )
    if architecture.pad_token_id != manifest.pad_token_id:
        raise UserError(
            f"init_from {name} has pad_token_id {architecture.pad_token_id}, the data {manifest.pad_token_id}: "
            "build the data with the model's tokenizer"
        )
    _check_vocabulary(name, architecture.vocab_size, folder, manifest)


def _check_vocabulary(name: str, vocab_size: int, folder: Path, manifest: Manifest) -> None:
    """Refuse another vocabulary than the data's; a model may have rows beyond the tokens of its tokenizer."""
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    if has_tokenizer:
        theirs, data = _tokens(folder), _tokens(manifest.tokenizer_folder)
        different = [number for number in theirs.keys() | data.keys() if theirs.get(number) != data.get(number)]
        if different:
            first = min(different)
            raise UserError(
                f"init_from {name} has another vocabulary than the data: token {first} is {theirs.get(first)!r} there, "
                f"{data.get(first)!r} in the data; build the data with `tokenizer: {name}`"
            )
    if vocab_size < manifest.vocab_size or (vocab_size > manifest.vocab_size and not has_tokenizer):
        raise UserError(
            f"init_from {name} has a vocabulary of {vocab_size} tokens, the data one of {manifest.vocab_size}: "
            "build the data with the model's tokenizer"
        )


def _tokens(folder: Path) -> dict[int, str]:
    """A tokenizer's tokens by their ids."""
    return {number: token for token, number in load_tokenizer(folder).get_vocab().items()}


def _read(name: str, layer_norm: str) -> tuple[PreTrainedModel, set[str]]:
    """The model in float32, and its names of the weights that the files lack: none, or those of the whole head."""
    try:
        with quiet_transformers():
            reference, info = MODEL_CLASSES[layer_norm].from_pretrained(
                _find(name), dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (*_FILE_ERRORS, *_FORMAT_ERRORS) as error:
        raise UserError(f"init_from {name}: its weights do not load ({first_line(error)})") from None
    if info["mismatched_keys"]:
        key, stored, expected = min(info["mismatched_keys"])
        raise UserError(f"init_from {name}: {key} has shape {list(stored)}, config.json says {list(expected)}")
    weights = reference.state_dict()
    missing = set(info["missing_keys"])
    head = {key for key in weights if key.startswith("cls.")} - {_DECODER}
    if missing and missing != head:
        raise UserError(f"init_from {name} lacks {len(missing)} of its weights, such as {min(missing)}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"init_from {name} has weights that are not finite numbers")
    if not torch.equal(weights[_DECODER], weights[_EMBEDDINGS]):
        raise UserError(f"init_from {name} has a decoder that is not tied to its embeddings, ours is")
    return reference, missing
