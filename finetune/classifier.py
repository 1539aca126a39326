"""A tuned classifier as it was saved, whole: plain, pruned or quantised."""

from pathlib import Path

from transformers import PreTrainedModel

from common.errors import UserError
from finetune.model import read_classifier
from finetune.quantization import is_quantized, load_quantized


def load_classifier(folder: Path) -> PreTrainedModel:
    """The classifier in a Hugging Face folder, its head included, on the CPU and ready to predict.

    Returns:
        In float32; a pruned one with its smaller layers, a quantised one with int8 weights.

    Raises:
        UserError: it is no classifier, weights are missing or damaged, or it is quantised and torchao isn't installed.
    """
    if is_quantized(folder):
        classifier, missing = load_quantized(folder)
    else:
        classifier, missing = read_classifier(folder)
        classifier = classifier.float()
    if missing:
        head = [name for name in missing if not name.startswith(f"{classifier.base_model_prefix}.")]
        hint = ": it is no classifier before it is fine-tuned" if head else ""
        raise UserError(f"the model in {folder} lacks weights (such as {min(head or missing)}){hint}")
    return classifier.eval()
