"""A checkpoint as a Hugging Face folder that loads anywhere, without remote code.

It needs the checkpoint alone: no GPU, no data folder, no DeepSpeed. An export ends with a comparison of logits between
the trained model and what transformers loads from the folder.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM

from common.errors import UserError
from common.folders import atomic_path, write_json, write_text
from common.hub import quiet_transformers
from data_prep.shards import TOKENIZER_FOLDER
from pretrain.architecture import Architecture
from pretrain.checkpoint import RECORD_FILE, Setting, copy_files, read_record, read_state
from pretrain.hugging_face import check_parity, first_line, load_tokenizer, to_hugging_face
from pretrain.model import MaskedLanguageModel
from pretrain.model_card import CARD_FILE, model_card
from pretrain.weight_files import read_weights

_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"


def export(checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint to ``folder``, whole or not at all; an earlier export there is replaced.

    Raises:
        UserError: the checkpoint is damaged or not ours, ``folder`` holds something else or can't be written.
        RuntimeError: the exported model's logits differ from the trained model's, which is a bug.
    """
    state, record = read_state(checkpoint), read_record(checkpoint)
    tokenizer_folder = checkpoint / TOKENIZER_FOLDER
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise UserError(f"{checkpoint} has no {TOKENIZER_FOLDER}/tokenizer.json: the checkpoint is not whole")
    mask_token = load_tokenizer(tokenizer_folder).mask_token
    _check_replaceable(folder, {file.name for file in tokenizer_folder.iterdir()})
    model = _trained_model(checkpoint, state.setting)
    exported = to_hugging_face(model)
    card = model_card(record, model.architecture, exported.num_parameters(), mask_token)
    try:
        with atomic_path(folder) as temporary, quiet_transformers():
            exported.save_pretrained(temporary)
            shutil.copymode(temporary / _CONFIG_FILE, temporary / _WEIGHTS_FILE)  # safetensors lets only its owner read
            copy_files(tokenizer_folder, temporary)
            write_json(temporary / RECORD_FILE, record)
            write_text(temporary / CARD_FILE, card)
            check_parity(model, AutoModelForMaskedLM.from_pretrained(temporary, dtype=torch.float32))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"can't write {folder} ({first_line(error)}): mend that and run the same command again"
        ) from None


def _check_replaceable(folder: Path, tokenizer_files: set[str]) -> None:
    """Refuse to write over what is not an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give another folder")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    ours = {_CONFIG_FILE, _WEIGHTS_FILE, RECORD_FILE, CARD_FILE, *tokenizer_files}
    if foreign := sorted(present - ours):
        raise UserError(f"{folder} holds {foreign[0]}, which is no part of an earlier export: give another folder")
    if present and not {_CONFIG_FILE, _WEIGHTS_FILE, RECORD_FILE} <= present:
        raise UserError(f"{folder} is not empty and not an earlier export: give another folder")


def _trained_model(checkpoint: Path, setting: Setting) -> MaskedLanguageModel:
    """The model of a checkpoint, on the CPU in float32 and in evaluation mode."""
    weights = read_weights(checkpoint, setting.zero_stage, setting.world_size)
    try:
        model = MaskedLanguageModel(Architecture(**setting.architecture))
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint}: its weights are not those of its architecture ({reason})") from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{checkpoint} holds weights that are not finite numbers: its training had diverged")
    return model.eval()
