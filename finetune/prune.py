"""``python -m finetune prune``: take heads out of a tuned model, fine-tune it again, in rounds, with several seeds.

A seed decides which training rows are held out, their order and dropout. The held-out rows decide how many heads a
round removes and are not trained on; the development split is only measured. The model itself has been tuned on all
training rows, the held-out ones included: they are held out from here on.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from common.errors import UserError
from common.folders import (
    atomic_path,
    check_folder,
    claim_folder,
    errors_of_writing,
    only_writer,
    processor_name,
    provenance,
    write_json,
)
from common.hub import save
from finetune.batches import DeviceSplit
from finetune.classifier import load_classifier
from finetune.examples import data_sha256, read_task
from finetune.grid import auto_precision
from finetune.heads import full_size, kept_heads, write_pruned_heads
from finetune.model import find_model, load_tokenizer, model_fingerprint, refuse_quantized
from finetune.model_record import ModelRecord, copy_pretraining, placed_model, read_record, write_record
from finetune.optimizers import Optimizer
from finetune.progress import duration
from finetune.pruning import POINTS, TIMED_ROWS, measure_speed, metrics_of
from finetune.pruning_report import write_pruning_report
from finetune.pruning_rounds import PruningRounds, State, state_of
from finetune.tasks import Task
from finetune.tokens import TokenizedSplit, load_tokens, select_rows, tokenize_split, typical_rows
from finetune.trial import Cell, Protocol

RESULTS_FILE: Final = "results.json"

_ROUNDS_FOLDER: Final = "rounds"
_CACHE_FOLDER: Final = "cache"
_FULL_SIZE_FOLDER: Final = "full_size"


@dataclass(frozen=True)
class PruneConfig:
    """How to prune."""

    num_seeds: int = 5
    """prunings, each with its own held-out rows, order of rows and dropout; the model of the median one is the
    result"""
    seed: int = 42
    """the first one's seed; the others' follow"""
    tolerance: float = 1.0
    """points (of the task's metric x 100) that a round's removal may cost on the held-out rows, before the model is
    fine-tuned again"""
    holdout: float = 0.1
    """share of the training rows that is held out"""
    rounds: int = 3
    """removals at most, each followed by fine-tuning; one that finds nothing to remove is the last"""
    learning_rate: float | None = None
    """of fine-tuning after each removal; default: as the model was tuned"""
    num_epochs: int | None = None
    """passes over the training rows after each removal; default: as the model was tuned"""
    batch_size: int | None = None
    """rows per optimizer step; default: as the model was tuned"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the matrix products; auto: bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU"""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("learning_rate", "num_epochs", "batch_size"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be more than 0")
        if not 0 <= self.seed <= 2**31 - 1 - self.num_seeds:
            raise ValueError(f"seed is {self.seed}: it must be 0 or more, and a 32-bit number")
        if not 0 <= self.tolerance <= 100:
            raise ValueError(f"tolerance is {self.tolerance}: it is in points, from 0 to 100")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}: it is a share, more than 0 and less than 1")


@dataclass(frozen=True)
class _Plan:
    """All that decides the result: what a rerun in the same folder must have in common with the first run."""

    model_sha256: Mapping[str, str]
    data_sha256: str
    seeds: list[int]
    tolerance: float
    holdout: float
    rounds: int
    cell: Mapping[str, Any]
    protocol: Mapping[str, Any]


def prune(
    config: PruneConfig, model: str, output_dir: Path, glue_dir: Path | None, with_full_size: bool = False
) -> None:
    """Prune a tuned model; what has been done of it in ``output_dir`` is not done again.

    Args:
        config: how.
        model: a folder of a classifier with its record of fine-tuning, or a hub id.
        output_dir: becomes the pruned model's folder, with ``results.json`` and the report.
        glue_dir: folder of the official TSV files; None reads GLUE from the Hugging Face hub.
        with_full_size: also make ``full_size`` in it: the same model with zeros for the removed heads, which stock
            transformers loads.

    Raises:
        UserError: bad input, before any work.
    """
    pruning = _Pruning(config, find_model(model), output_dir, glue_dir)
    check_folder(output_dir, pruning.plan)
    with errors_of_writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        with only_writer(output_dir):
            claim_folder(output_dir, pruning.plan)
            results = pruning.run()
            write_json(output_dir / RESULTS_FILE, results)
            write_pruning_report(output_dir, results)
            median_seed = results["median_seed"]
            pruning.write_model(median_seed, results["seeds"][str(median_seed)], with_full_size)
    print(f"{output_dir}: the model of seed {median_seed}, {RESULTS_FILE} and the report")


class _Pruning:
    """A pruning on its way: the model, its rows, and what each round has left in the folder."""

    def __init__(self, config: PruneConfig, folder: Path, output_dir: Path, glue_dir: Path | None) -> None:
        self._record = read_record(folder)
        self._task = self._record.task
        self._folder, self._output_dir = folder, output_dir
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(folder, self._task).to(self._device)
        self._tokenizer = load_tokenizer(folder)
        self._cell = _cell(config, self._record)
        self._examples = read_task(self._task, glue_dir)
        self._checksums = model_fingerprint(folder)
        # The last epoch's score: the best one would let the development split decide.
        changes = {"score_epoch": "last", "eval_steps": None, "compile": False}
        if config.num_epochs is not None:
            changes["max_steps"] = None
        self.plan = _Plan(
            model_sha256=self._checksums,
            data_sha256=data_sha256(self._examples),
            seeds=[config.seed + index for index in range(config.num_seeds)],
            tolerance=config.tolerance,
            holdout=config.holdout,
            rounds=config.rounds,
            cell=asdict(self._cell),
            protocol={**self._record.protocol, **changes},
        )
        num_train = min(len(self._examples["train"]), self._record.rows["train"])
        if not 1 <= round(config.holdout * num_train) < num_train:
            raise UserError(f"holdout {config.holdout:g} of {num_train:,} training rows leaves none on one side")

    def run(self) -> dict[str, Any]:
        """Every round of every seed that is not recorded yet; returns the content of ``results.json``."""
        precision = self._cell.precision
        metrics = {
            name: metrics_of(self._model, self._task, data, precision) for name, data in self._evaluation.items()
        }
        before = state_of(self._model, self._folder, self._task, metrics)
        seeds = self._run_seeds(before)
        self._measure_speed([before, *(state for states in seeds.values() for state in states)])
        scores = {seed: (states or [before])[-1]["score"] for seed, states in seeds.items()}
        median = statistics.median_low(scores.values())
        on_gpu = self._device.type == "cuda"
        return {
            "model": f"{self._folder.resolve().parent.name}/{self._folder.resolve().name}",
            "base_model": self._record.base_model,
            "title": self._task.title,
            "metric": self._task.selected_by,
            "rows": {split: len(tokens) for split, tokens in self._tokens.items()},
            "plan": asdict(self.plan),
            "device": torch.cuda.get_device_name(self._device) if on_gpu else processor_name(),
            "num_threads": None if on_gpu else torch.get_num_threads(),
            "before": before,
            "seeds": {str(seed): states for seed, states in seeds.items()},
            "median_seed": min(seed for seed, score in scores.items() if score == median),
        }

    @cached_property
    def _tokens(self) -> dict[str, TokenizedSplit]:
        return {split: self._tokenize(split) for split in self._task.splits}

    @cached_property
    def _evaluation(self) -> dict[str, DeviceSplit]:
        return {split: DeviceSplit(self._tokens[split], self._device) for split in self._task.evaluation_splits}

    @cached_property
    def _rounds(self) -> PruningRounds:
        return PruningRounds(
            folder=self._output_dir / _ROUNDS_FOLDER,
            model=self._model,
            task=self._task,
            cell=self._cell,
            protocol=Protocol(**self.plan.protocol),
            tolerance=self.plan.tolerance,
            holdout=self.plan.holdout,
            training=self._tokens["train"],
            evaluation=self._evaluation,
            device=self._device,
        )

    def _tokenize(self, split: str) -> TokenizedSplit:
        """The rows that the model was tuned and measured on: as many of the first ones."""
        folder = tokenize_split(
            self._examples[split],
            self._task,
            self._tokenizer,
            self._checksums["tokenizer"],
            self._record.max_seq_length,
            self._output_dir / _CACHE_FOLDER,
        )
        tokens = load_tokens(folder)
        return select_rows(tokens, np.arange(min(len(tokens), self._record.rows[split])))

    def _run_seeds(self, before: State) -> dict[int, list[State]]:
        """The states after each round that removed heads, by seed."""
        seeds: dict[int, list[State]] = {seed: [] for seed in self.plan.seeds}
        started, num_run = time.monotonic(), 0
        for place, (seed, states) in enumerate(seeds.items()):
            for number in range(1, self.plan.rounds + 1):
                is_recorded = self._rounds.is_recorded(seed, number)
                state = self._rounds.read(seed, number) if is_recorded else self._rounds.run(seed, number)
                num_run += not is_recorded
                if not state["choice"]["heads"]:
                    break
                states.append(state)
                left = (len(seeds) - place) * self.plan.rounds - number
                time_left = f", {duration((time.monotonic() - started) / num_run * left)}" if num_run else ""
                print(f"{_told(seed, number, before, state)}; rounds left: at most {left}{time_left}", flush=True)
        return seeds

    def _measure_speed(self, states: list[State]) -> None:
        """Into each state the rows a second of its shapes; all are measured in turn."""
        rows = self._tokens[self._task.evaluation_splits[0]]
        data = DeviceSplit(typical_rows(rows, TIMED_ROWS), self._device)
        removed = [{int(layer): heads for layer, heads in state["removed"].items()} for state in states]
        for state, speeds in zip(states, measure_speed(self._model, removed, data, self._cell.precision), strict=True):
            state["rows_per_second"] = {str(batch_size): speed for batch_size, speed in speeds.items()}

    def write_model(self, seed: int, states: list[State], with_full_size: bool) -> None:
        """Put a seed's last model at the top of the output folder, and its full-size form where that is wanted."""
        classifier = self._rounds.classifier(seed, len(states))
        record = self._record_after(seed, states)
        with placed_model(self._output_dir) as folder:
            self._save(folder, classifier, record)
        if with_full_size:
            with atomic_path(self._output_dir / _FULL_SIZE_FOLDER) as temporary:
                temporary.mkdir()
                self._save(temporary, full_size(classifier), record)

    def _save(self, folder: Path, classifier: PreTrainedModel, record: ModelRecord) -> None:
        save(folder, classifier, self._tokenizer)
        write_pruned_heads(folder, classifier)
        write_record(folder, record)
        copy_pretraining(self._folder, folder)

    def _record_after(self, seed: int, states: list[State]) -> ModelRecord:
        """The model's record, as the last round's fine-tuning changes it."""
        if not states:
            return self._record
        last = states[-1]
        return replace(
            self._record,
            rows={split: len(tokens) for split, tokens in self._tokens.items()},  # held-out ones included, as before
            cell=asdict(replace(self._cell, seed=seed)),
            protocol=self.plan.protocol,
            score=last["score"],
            metrics=last["metrics"],
            epochs=last["epochs"],
            seconds=sum(state["seconds"] for state in states),
            device=last["device"],
            versions={name: version for name, version in provenance()["versions"].items() if version},
        )


def _told(seed: int, number: int, before: State, state: State) -> str:
    heads, scores = ((before[name], state[name]) for name in ("num_heads", "score"))
    return (
        f"seed {seed}, round {number}: {heads[0]} -> {heads[1]} heads since the start, fine-tuned again,"
        f" {POINTS * scores[0]:.1f} -> {POINTS * scores[1]:.1f} on the development split"
    )


def _load(folder: Path, task: Task) -> PreTrainedModel:
    refuse_quantized(folder)
    classifier = load_classifier(folder)
    if classifier.config.num_labels != task.num_labels:
        raise UserError(f"the model in {folder} has {classifier.config.num_labels} outputs: it is not {task.title}'s")
    if all(len(heads) == 1 for heads in kept_heads(classifier).values()):
        raise UserError(f"the model in {folder} has one attention head in each layer: none can be removed")
    return classifier


def _cell(config: PruneConfig, record: ModelRecord) -> Cell:
    """How the model was tuned, but for what ``config`` names."""
    precision = auto_precision() if config.precision == "auto" else config.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU, and there is none: use bf16 or fp32")
    named = {name: getattr(config, name) for name in ("learning_rate", "num_epochs", "batch_size")}
    changes = {name: value for name, value in named.items() if value is not None}
    optimizer = Optimizer(**record.cell["optimizer"])
    return Cell(**{**record.cell, **changes, "seed": config.seed, "precision": precision, "optimizer": optimizer})
