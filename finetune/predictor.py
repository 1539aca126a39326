"""A tuned model with its tokenizer: texts in, logits out."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from common.errors import UserError
from finetune.batches import DeviceSplit
from finetune.classifier import load_classifier
from finetune.examples import Examples
from finetune.inference import Precision, predict
from finetune.model import load_tokenizer
from finetune.model_record import RECORD_FILE, ModelRecord, read_record
from finetune.quantization import is_quantized
from finetune.tokens import tokenize

_ROWS_AT_ONCE: Final = 4096  # enough to find others of a row's length; few enough to see progress

Sentences = tuple[list[str], ...]
"""One list of texts, or two of the same length: first and second texts."""


class Predictor:
    """A classifier of this program's or another's, loaded once for any number of texts."""

    def __init__(
        self,
        folder: Path,
        max_seq_length: int | None = None,
        precision: Precision = "fp32",
        device: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            folder: Hugging Face folder of a classifier.
            max_seq_length: tokens of a row, longer ones being cut; default: what the model was tuned with, or all that
                it has positions for.
            precision: of the matrix products; a quantised model has its own.
            device: such as ``cpu`` or ``cuda:0``; default: the GPU, where there is one and the model is not quantised.

        Raises:
            UserError: the model is damaged or no classifier, or can't take ``max_seq_length``.
        """
        self.folder = folder
        self.classifier = load_classifier(folder)
        self.record: ModelRecord | None = read_record(folder) if (folder / RECORD_FILE).is_file() else None
        quantized = is_quantized(folder)
        on_gpu = torch.cuda.is_available() and not quantized
        self.device = torch.device(device or ("cuda" if on_gpu else "cpu"))
        self.classifier.to(self.device)
        self._precision: Precision = "fp32" if quantized else precision
        self._tokenizer = load_tokenizer(folder)
        self.max_seq_length = self._length(max_seq_length)

    def _length(self, wanted: int | None) -> int:
        positions = getattr(self.classifier.config, "max_position_embeddings", self._tokenizer.model_max_length)
        longest = min(positions, self._tokenizer.model_max_length)
        if wanted is None:
            return self.record.max_seq_length if self.record else longest
        if not 0 < wanted <= longest:
            raise UserError(f"max_seq_length is {wanted}: the model in {self.folder} takes from 1 to {longest} tokens")
        return wanted

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels' names in the order of the outputs; None for a score."""
        config = self.classifier.config
        return None if config.num_labels == 1 else tuple(config.id2label[index] for index in range(config.num_labels))

    @property
    def num_sentences(self) -> int | None:
        """Texts of a row, 1 or 2; None for a model without a record of its task."""
        return len(self.record.task.sentence_columns) if self.record else None

    def logits(
        self,
        sentences: Sentences,
        batch_size: int | None = None,
        progress: Callable[[int], object] = lambda num_rows: None,
    ) -> np.ndarray:
        """The outputs of all rows, in their order; float32 [rows, outputs].

        Args:
            sentences: the rows' texts.
            batch_size: rows computed at a time; default: as in training's evaluations.
            progress: called with a number of rows whenever so many more are done.

        Raises:
            UserError: outputs are not finite numbers.
        """
        parts = []
        for start in range(0, len(sentences[0]), _ROWS_AT_ONCE):
            rows = Examples(tuple(texts[start : start + _ROWS_AT_ONCE] for texts in sentences), None)
            data = DeviceSplit(tokenize(rows, self._tokenizer, self.max_seq_length), self.device)
            logits, _ = predict(self.classifier, data, self._precision, batch_size=batch_size)
            if not logits.isfinite().all():
                raise UserError(f"the model in {self.folder} does not predict finite numbers: it is damaged")
            parts.append(logits.numpy())
            progress(len(rows))
        return np.concatenate(parts)
