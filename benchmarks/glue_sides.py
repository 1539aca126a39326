"""Who fine-tunes: this project's trial, and Hugging Face's Trainer from the same weights on the same rows."""

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from finetune.batches import DeviceSplit
from finetune.examples import read_task
from finetune.inference import EVALUATION_BATCH_SIZE, Precision
from finetune.metrics import compute
from finetune.model import Encoder, Initialization, load_tokenizer
from finetune.tasks import TASKS
from finetune.tokens import TokenizedSplit, load_tokens, tokenize_split
from finetune.trial import MAX_GRADIENT_NORM, Cell, Protocol, run_trial

MAX_SEQ_LENGTH = 128
WEIGHT_DECAY = 0.1
WARMUP_PROPORTION = 0.06
Rows = Mapping[str, TokenizedSplit]


@dataclass(frozen=True)
class FineTuning:
    """What all sides do alike: linear warmup and decay, fused AdamW, clipping, the last epoch's score."""

    task_name: str
    learning_rate: float
    batch_size: int
    num_epochs: int
    precision: Precision
    """Of the matrix products; weights and optimizer are float32."""
    initialization: Initialization = "pretrained"


@dataclass(frozen=True)
class Outcome:
    """What one trial has given."""

    score: float
    """A fraction, of the metric that selects a configuration."""
    rows_per_second: float
    """Of training alone."""
    seconds: float
    """From the model's making to the last score."""


def load_rows(task_name: str, glue_dir: Path, model_folder: Path) -> Rows:
    """Every split of the task as tokens.

    Raises:
        UserError: a file is missing or wrong.
    """
    task, tokenizer = TASKS[task_name], load_tokenizer(model_folder)
    with tempfile.TemporaryDirectory() as cache:
        splits = {
            name: load_tokens(tokenize_split(examples, task, tokenizer, "", MAX_SEQ_LENGTH, Path(cache)))
            for name, examples in read_task(task, glue_dir).items()
        }
        return {name: some_rows(split, np.arange(len(split))) for name, split in splits.items()}


def some_rows(split: TokenizedSplit, places: np.ndarray) -> TokenizedSplit:
    """The rows at these places, in memory."""
    tokens = np.concatenate([np.arange(split.offsets[place], split.offsets[place + 1]) for place in places])
    return replace(
        split,
        input_ids=np.array(split.input_ids[tokens]),
        token_type_ids=None if split.token_type_ids is None else np.array(split.token_type_ids[tokens]),
        offsets=np.cumsum([0, *split.lengths[places]], dtype=np.int64),
        labels=np.array(split.labels[places]),
    )


def standard_errors_apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The difference of two means in its standard errors, as in Welch's t-test; 0 or more."""
    standard_error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    return abs(statistics.mean(ours) - statistics.mean(theirs)) / max(standard_error, 1e-9)


def make_random_model(folder: Path, vocabulary: Path, **sizes: float) -> Path:
    """A folder with an untrained BERT, by default of MiniLM's six narrow layers; good for speeds only."""
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **minilm | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Ours:
    """This project's trial, as a worker of the grid runs it."""

    name = "ours"

    def run(self, work: FineTuning, seed: int, rows: Rows, encoder: Encoder, device: torch.device) -> Outcome:
        """One trial; the only place that knows its interface."""
        settings = asdict(work)
        protocol = Protocol(MAX_SEQ_LENGTH, WEIGHT_DECAY, WARMUP_PROPORTION)
        data = {name: DeviceSplit(split, device) for name, split in rows.items()}
        result, _ = run_trial(TASKS[work.task_name], Cell(**settings, seed=seed), protocol, encoder, data, device)
        return Outcome(result["score"], result["rows_per_second"], result["seconds"])


class HuggingFace:
    """``transformers.Trainer``, rows in random order; nothing is logged, saved or evaluated while it trains.

    Args:
        padding: ``max_length`` pads every row to 128 once, as `run_glue` does by default; ``longest`` pads a batch to
            its longest row when it is put together, as `run_glue --pad_to_max_length false`.
    """

    def __init__(self, padding: Literal["max_length", "longest"]) -> None:
        self.name = {"max_length": "padded", "longest": "dynamic"}[padding]
        self._padding = padding

    def run(self, work: FineTuning, seed: int, rows: Rows, encoder: Encoder, device: torch.device) -> Outcome:
        """One trial from the weights that ours starts from with this seed, head included."""
        started = time.monotonic()
        task, tokenizer = TASKS[work.task_name], load_tokenizer(encoder.folder)
        torch.manual_seed(seed)
        classifier = encoder.new_classifier(task, work.initialization, device)
        clock, dev = _EpochClock(device), rows[task.evaluation_splits[0]]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=classifier,
                args=_training_arguments(folder, work, seed, device),
                data_collator=default_data_collator if self._padding == "max_length" else self._collator(tokenizer),
                train_dataset=self._examples(rows["train"], tokenizer),
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)  # it writes between the tables
            trainer.train()
            logits = trainer.predict(self._examples(dev, tokenizer)).predictions
        predictions = logits.argmax(axis=-1) if task.labels else logits.squeeze(-1)
        score = compute(task.metrics, predictions, dev.labels)[task.selected_by]
        trained = work.num_epochs * len(rows["train"])
        return Outcome(score, trained / clock.seconds, time.monotonic() - started)

    def _collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(tokenizer, padding="longest")

    def _examples(self, split: TokenizedSplit, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Rows as `run_glue` has them, in a list: a data set on disk would only add to what they cost."""
        examples = []
        for start, stop, label in zip(split.offsets[:-1], split.offsets[1:], split.labels, strict=True):
            example = {"input_ids": split.input_ids[start:stop].tolist()}
            if split.token_type_ids is not None:
                example["token_type_ids"] = split.token_type_ids[start:stop].tolist()
            example = tokenizer.pad(example, padding=self._padding, max_length=MAX_SEQ_LENGTH)
            examples.append({**example, "label": label.item()})
        return examples


class _EpochClock(TrainerCallback):
    """The seconds of all epochs, without what comes before and after them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.monotonic() - self._started


def _training_arguments(folder: str, work: FineTuning, seed: int, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        learning_rate=work.learning_rate,
        per_device_train_batch_size=work.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
        num_train_epochs=work.num_epochs,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_PROPORTION,  # below 1: a share of the steps
        max_grad_norm=MAX_GRADIENT_NORM,
        optim="adamw_torch_fused",
        bf16=work.precision == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for the device in every step
        report_to="none",
        disable_tqdm=True,
    )
