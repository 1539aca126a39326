"""Models with 8-bit integers for weights and activations, by torchao, in the form that transformers saves and loads.

Every linear layer's weight becomes int8 with one scale a row, once; its input becomes int8 with one scale a token, as
it comes. Embeddings, biases and LayerNorms stay float32.
"""

import importlib.util
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TorchAoConfig

from common.errors import UserError
from common.folders import read_json
from common.hub import quiet_transformers


def is_quantized(folder: Path) -> bool:
    """Whether the folder's weights are integers.

    Raises:
        UserError: its ``config.json`` is missing or damaged.
    """
    return "quantization_config" in read_json(folder / "config.json", f"{folder} is not a Hugging Face folder")


def require_torchao() -> None:
    """Refuse to go on without torchao.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("quantised models need torchao, which is not installed: pip install 'torchao>=0.18'")


def quantize(folder: Path) -> PreTrainedModel:
    """The float32 classifier of ``folder`` with int8 linear layers; ``save_pretrained`` writes it as such.

    Raises:
        UserError: torchao is not installed, the model does not load, or it has no linear layers.
    """
    require_torchao()
    # torchao: slow to import, and an optional extra
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.utils import should_reduce_range

    int8 = Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False,  # settings of the whole process, which the model as loaded would not have
        reduce_range=should_reduce_range(torch.device("cpu")),  # products of an older CPU would overflow
    )
    classifier, _ = _read(folder, quantization_config=TorchAoConfig(int8))
    if num_int8_weights(classifier) == 0:
        raise UserError(f"the model in {folder} has no linear layers of torch's to quantise")
    return classifier


def load_quantized(folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """The quantised classifier as saved, and the names of weights that are missing there.

    Raises:
        UserError: torchao is not installed, or the model does not load.
    """
    require_torchao()
    return _read(folder)


def _read(folder: Path, **options: TorchAoConfig) -> tuple[PreTrainedModel, set[str]]:
    try:
        with quiet_transformers():
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} does not load: {str(error).splitlines()[0]}") from None
    return classifier.eval(), set(info["missing_keys"])


def num_int8_weights(classifier: PreTrainedModel) -> int:
    """How many of the model's parameters are 8-bit integers, their scales not counted."""
    # A quantised weight tells the type that it computes with, float32; the integers lie in its ``qdata``.
    stored = (getattr(parameter, "qdata", parameter) for parameter in classifier.parameters())
    return sum(math.prod(tensor.shape) for tensor in stored if tensor.dtype == torch.int8)
