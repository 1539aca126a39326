"""The README.md of a fine-tuned model: what it does and how it was made, from its own records alone.

What the records do not tell is left out, never guessed; so is the license, which no run knows. Every score is of the
development set and says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from common.page import markdown_table
from finetune.metrics import METRIC_TITLES
from finetune.model_record import ModelRecord
from finetune.optimizers import Optimizer
from finetune.overfitting import turning_point
from finetune.plots import rate_text
from finetune.results import Results
from finetune.run_tables import number
from finetune.score_tables import percent
from finetune.tasks import HUB_DATASET, Task

CARD_FILE: Final = "README.md"
_HUB_METRICS: Final = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    repo_id: str
    record: ModelRecord
    labels: tuple[str, ...]
    """The names that the model gives its outputs."""
    num_bytes: int
    """Of the weights."""
    license: str | None = None
    removed_heads: Mapping[int, list[int]] | None = None
    """Layer to removed attention heads; None for a model that has all."""
    is_quantized: bool = False
    results: Results | None = None
    """Of the run that the model is the result of, where that is known."""
    pretraining: Mapping[str, Any] | None = None
    """The content of ``pretraining.json``, where the base model has one."""

    @property
    def task(self) -> Task:
        """What the model was tuned for."""
        return self.record.task

    @property
    def hub_base_model(self) -> str | None:
        """The base model's id if it came from the hub: its folder then lies in the hub's cache."""
        cached = f"models--{self.record.base_model.replace('/', '--')}"
        return self.record.base_model if cached in Path(self.record.base_model_path).parts else None

    @property
    def summary(self) -> Mapping[str, Any] | None:
        """What the run's results tell of the task, over all seeds."""
        return self.results and self.results["tasks"].get(self.record.task_name)


def model_card(subject: Subject) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads."""
    record, task = subject.record, subject.task
    parts = [
        f"---\n{yaml.safe_dump(_metadata(subject), sort_keys=False, allow_unicode=True)}---",
        f"# {task.title}: {record.base_model} fine-tuned",
        _introduction(subject),
        "## Use",
        _use(subject),
        "## Results",
        *_results(subject),
        "## Training",
        _facts(_training(subject)),
        *_epochs(subject),
        *_pretraining(subject),
        "## Limits",
        _limits(subject),
        "## Software",
        _facts({name: version for name, version in record.versions.items() if version}),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(subject: Subject) -> dict[str, Any]:
    """What the hub reads; a pruned model is none of transformers', so that no one is told to load it there."""
    task = subject.task
    facts = {
        "language": "en" if task.is_glue else None,
        "license": subject.license,
        "library_name": None if subject.removed_heads else "transformers",
        "pipeline_tag": "text-classification",
        "base_model": subject.hub_base_model,
        "datasets": [HUB_DATASET] if task.is_glue else None,
        "metrics": [_HUB_METRICS[metric] for metric in task.metrics],
        "tags": ["pruned"] * bool(subject.removed_heads) + ["int8", "torchao"] * subject.is_quantized or None,
        "model-index": [{"name": subject.repo_id.split("/")[-1], "results": _index(subject)}],
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _index(subject: Subject) -> list[dict[str, Any]]:
    """One result for each evaluation split, of this model and no other seed."""
    task, record = subject.task, subject.record
    return [
        {
            "task": {"type": "text-classification", "name": "Text Classification"},
            "dataset": {
                "name": f"{'GLUE ' if task.is_glue else ''}{task.title}, {_split_title(subject, split)}",
                "type": HUB_DATASET if task.is_glue else task.task_name,
                **({"config": task.hub_config} if task.is_glue else {}),
                "split": split.replace("dev", "validation"),
            },
            "metrics": [
                {
                    "type": _HUB_METRICS[metric],
                    "value": round(value, 4),
                    "name": f"{METRIC_TITLES[metric]} (development set)",
                }
                for metric, value in metrics.items()
            ],
        }
        for split, metrics in record.metrics.items()
    ]


def _split_title(subject: Subject, split: str) -> str:
    """``development set``, with the number of rows where it is not the official one."""
    used, official = subject.record.rows[split], subject.task.official_rows.get(split)
    title = "development set" + {"dev_matched": ", matched", "dev_mismatched": ", mismatched"}.get(split, "")
    return title if official in (None, used) else f"{title} ({used:,} rows, not the official {official:,})"


def _introduction(subject: Subject) -> str:
    task, record = subject.task, subject.record
    texts = "a text" if len(task.sentence_columns) == 1 else "two texts"
    gives = f"one of {', '.join(f'`{label}`' for label in subject.labels)}" if task.labels else "a score"
    sentences = [f"Takes {texts} and gives {gives}: `{record.base_model}`, fine-tuned on {_data_title(task)}."]
    if task.synthetic:
        sentences.append("The data are synthetic, made for a demonstration.")
    if subject.removed_heads:
        total = sum(map(len, subject.removed_heads.values()))
        heads = number(total, "attention head")
        sentences.append(f"Pruned: {heads} fewer, the least important ones, and tuned again.")
    if subject.is_quantized:
        sentences.append("The weights of its linear layers are 8-bit integers, and so are their inputs at run time.")
    return " ".join(sentences)


def _data_title(task: Task) -> str:
    return f"{task.title} of [GLUE](https://gluebenchmark.com)" if task.is_glue else f"the data of “{task.title}”"


def _use(subject: Subject) -> str:
    if subject.removed_heads:
        return (
            "Its attention has fewer heads than its `config.json` tells, a form that transformers does not know and"
            " refuses to load. With the program that made it, after `hf download"
            f" {subject.repo_id} --local-dir model`:\n\n```\npython -m finetune predict model {_shell_example(subject)}"
            "\n```"
        )
    needs = "Needs `pip install torchao`.\n\n" if subject.is_quantized else ""
    pair = len(subject.task.sentence_columns) == 2
    example = {"text": "A text.", "text_pair": "Another one."} if pair else "A text."
    options = "" if subject.task.labels else ', function_to_apply="none"'
    return (
        f"{needs}```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", model="{subject.repo_id}"{options})\n'
        f"print(classify({json.dumps(example)}, truncation=True, max_length={subject.record.max_seq_length}))\n```"
    )


def _shell_example(subject: Subject) -> str:
    return '"A text. | Another one."' if len(subject.task.sentence_columns) == 2 else '"A text."'


def _results(subject: Subject) -> list[str]:
    """Of this model, and of all seeds beside it where the run tells."""
    record, summary = subject.record, subject.summary
    header = ["development set", "metric", "this model"]
    header += ["median", "mean", "deviation", "best"] if summary else []
    rows = [
        [
            split,
            METRIC_TITLES[metric],
            percent(value),
            *([percent(summary["statistics"][split][metric][key]) for key in _STATISTICS] if summary else []),
        ]
        for split, metrics in record.metrics.items()
        for metric, value in metrics.items()
    ]
    note = "Scores x 100 on the development set, not on the test server."
    if summary:
        several = summary["num_configurations"] > 1
        note += (
            f" Median, mean, sample standard deviation and best are of {number(len(summary['scores']), 'seed')}"
            f"{' of the configuration with the highest median' if several else ''}; this model is the median seed's."
            " All trials are in `results.json` and, as tables and figures, in `report.html`."
        )
    return [markdown_table(header, rows), note]


_STATISTICS: Final = ("median", "mean", "std", "best")


def _training(subject: Subject) -> dict[str, str]:
    record, summary = subject.record, subject.summary
    cell, protocol = record.cell, record.protocol
    warmup = protocol["warmup_steps"]
    facts = {f"rows, {split}": f"{rows:,}" for split, rows in record.rows.items()}
    facts |= {
        "tokens a row, at most": f"{record.max_seq_length}",
        "started from": {"mnli": "the model tuned on MNLI", "random": "random weights"}.get(cell["initialization"], ""),
        "learning rate": rate_text(cell["learning_rate"]),
        "rows a step": str(cell["batch_size"]),
        "epochs": str(cell["num_epochs"]),
        "steps, at most": f"{protocol['max_steps']:,}" if protocol["max_steps"] else "",
        "score": f"of the {protocol['score_epoch']} epoch",
        "optimizer": Optimizer(**cell["optimizer"]).title,
        "weight decay": f"{protocol['weight_decay']:g}",
        "schedule": protocol["lr_schedule"],
        "warmup": f"{100 * protocol['warmup_proportion']:g} %" if warmup is None else number(warmup, "step"),
        "precision of matrix products": cell["precision"],
        "seed": str(cell["seed"]),
        "seeds": ", ".join(map(str, subject.results["seeds"])) if summary else "",
        "grid": f"{number(summary['num_configurations'], 'configuration')} for each seed" if summary else "",
        "time of this run": _duration(record.seconds),
        "time of all runs of the grid": _duration(summary["seconds"]) if summary else "",
        "device": record.device,
        "size of the weights": f"{subject.num_bytes / 1e6:,.1f} MB",
        "attention heads removed": "; ".join(
            f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in (subject.removed_heads or {}).items()
        ),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _epochs(subject: Subject) -> list[str]:
    """Losses and metric after each epoch, and whether the run overfits."""
    record = subject.record
    if not record.epochs:
        return []
    split = next(iter(record.metrics))
    rows = [
        [
            f"{epoch['epoch']}",
            f"{epoch['train_loss']:.4f}",
            f"{epoch['eval_loss']:.4f}",
            percent(epoch["metrics"][split][record.metric]),
        ]
        for epoch in record.epochs
    ]
    table = markdown_table(["epoch", "training loss", "validation loss", METRIC_TITLES[record.metric]], rows)
    point = turning_point(record.epochs)
    if point is None:
        return ["## Epochs", table]
    after = record.epochs[record.epochs.index(point) + 1]["epoch"]
    return [
        "## Epochs",
        table,
        f"Overfits from epoch {after} on: validation loss has risen since, while training loss fell.",
    ]


def _pretraining(subject: Subject) -> list[str]:
    pretraining = subject.pretraining
    if not pretraining:
        return []
    facts = {
        "time budget": _duration(pretraining.get("time_budget_seconds")),
        "time used": _duration(pretraining.get("elapsed_seconds")),
        "hardware": pretraining.get("hardware", ""),
        **{name: f"{pretraining[key]:,}" for name, key in _PRETRAINING.items() if pretraining.get(key) is not None},
        **{
            f"{name} loss": f"{pretraining[key][-1]['loss']:.4f} at step {pretraining[key][-1]['step']:,}"
            for name, key in (("training", "train"), ("validation", "validation"))
            if pretraining.get(key)
        },
        "SHA-256 of the data's manifest": pretraining.get("manifest_sha256", ""),
    }
    note = "The base model's own: masked language modelling, losses in nats."
    return ["## Pretraining", note, _facts({name: fact for name, fact in facts.items() if fact})]


_PRETRAINING: Final = {
    "optimizer steps": "steps",
    "sequences": "sequences",
    "passes over the data": "epochs",
    "sequences a step": "train_batch_size",
}


def _limits(subject: Subject) -> str:
    task, summary = subject.task, subject.summary
    limits = [
        f"It has seen {number(subject.record.rows['train'], 'row')} of one data set, and texts of other kinds were not"
        f" tried. Texts are cut after {subject.record.max_seq_length} tokens.",
        "What biases the base model and the data have, this model has too; none were measured.",
    ]
    if summary and summary["num_configurations"] > 1:
        limits.append(
            f"The best of {number(summary['num_configurations'], 'configuration')} was selected on the development set,"
            " so its score there flatters."
        )
    unofficial = [
        f"{used:,} of {task.official_rows[split]:,} {'training' if split == 'train' else split} rows"
        for split, used in subject.record.rows.items()
        if task.official_rows.get(split, used) != used
    ]
    if unofficial:
        limits.append(f"Not the official rows, so no GLUE score: {', '.join(unofficial)}.")
    return "\n".join(f"- {limit}" for limit in limits)


def _facts(facts: Mapping[str, str]) -> str:
    return markdown_table(("", ""), list(facts.items()))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.1f} s" + (f" ({seconds / 3600:.1f} h)" if seconds >= 3600 else "")
