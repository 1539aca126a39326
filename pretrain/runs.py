"""A run's folder as one typed record, whether the run has ended, was stopped or is still going.

The summary tells of a run that has come to an orderly end; before it there are the record of events and the newest
checkpoint.
"""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.folders import CONFIG_FILE, leaves, read_json, require_folder
from pretrain.architecture import PRESETS, Architecture
from pretrain.run_record import METRICS_FILE, STATUS_FILE, SUMMARY_FILE, lost_seconds, read_metrics

_LAYER_NORMS = {"pre_ln": "pre-LN", "post_ln": "post-LN"}


@dataclass(frozen=True)
class TrainPoint:
    """What the steps since the point before have measured."""

    elapsed_seconds: float
    learning_rate: float
    sequences_per_second: float
    flop_utilisation: float
    """The model's operations over what the hardware could do in that time."""


@dataclass(frozen=True)
class ValidationPoint:
    """The whole held-out set under the weights of one step."""

    step: int
    elapsed_seconds: float
    loss: float
    """Mean over all predictions, in nats."""
    accuracy: float | None
    """Share of the predictions that are right; None where it was not recorded."""


@dataclass(frozen=True)
class Run:
    """What a report tells of a run; None where its folder does not tell (yet)."""

    name: str
    architecture: Architecture | None
    hardware: str | None
    world_size: int | None
    """Processes, each with its GPU if there are any."""
    budget: str
    """As configured: a time, or a number of steps."""
    time_budget_seconds: float | None
    train_batch_size: int
    learning_rate: float
    """The peak."""
    options: Mapping[str, Any]
    """The whole configuration, by dotted names."""
    manifest_sha256: str | None
    """Of the data folder, and so of the held-out text."""
    steps: int
    sequences: int
    epochs: float | None
    elapsed_seconds: float
    """What counts against the budget."""
    closing_seconds: float
    """The last checkpoint, validation and export, after the budget's end."""
    lost_seconds: float
    """Of work that kills have destroyed."""
    spent_seconds: Mapping[str, float]
    """What ``elapsed_seconds`` went into; empty before the run's end."""
    stopped_by: str | None
    """None before the run's end."""
    stopped_because: str | None
    phase: str | None
    """What its processes last said they were doing, and since when; None after its end."""
    final_loss: float | None
    """Validation loss of the weights that the run has ended with."""
    final_accuracy: float | None
    train: tuple[TrainPoint, ...]
    validation: tuple[ValidationPoint, ...]

    @property
    def model(self) -> str | None:
        """The preset's name if it is one, and the place of the LayerNorms."""
        if (sizes := self.architecture) is None:
            return None
        shape = (sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads)
        is_preset = shape in PRESETS.values() and sizes.intermediate_size == 4 * sizes.hidden_size
        name = next(name for name in PRESETS if PRESETS[name] == shape) if is_preset else f"{shape[0]} x {shape[1]:,}"
        return f"{name}, {_LAYER_NORMS.get(sizes.layer_norm, sizes.layer_norm)}"

    @property
    def device_hours(self) -> float | None:
        """Hours of all devices together, of everything that they have worked for the run."""
        seconds = self.elapsed_seconds + self.closing_seconds + self.lost_seconds
        return None if self.world_size is None else self.world_size * seconds / 3600

    def median_of(self, name: str) -> float | None:
        """Of a field of ``train``; None before the first line of the log."""
        return statistics.median(getattr(point, name) for point in self.train) if self.train else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of several folders, named so that they differ; a folder given twice is read once.

    Raises:
        UserError: a folder is not a run's, holds no metrics yet, or is damaged.
    """
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    names = [folder.name for folder in distinct]
    if len(set(names)) < len(names):
        depth = next(n for n in range(2, 1000) if len({folder.parts[-n:] for folder in distinct}) == len(distinct))
        names = ["/".join(folder.parts[-depth:]) for folder in distinct]
    return [read_run(folder, name) for folder, name in zip(distinct, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """The run of one folder.

    Raises:
        UserError: it is not a run's folder, holds no metrics yet, or is damaged.
    """
    require_folder(folder, "run")
    for file in (METRICS_FILE, CONFIG_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not the folder of a pretraining run: it has no {file}")
    with _damaged(folder / METRICS_FILE):
        events = read_metrics(folder)
        train, validation = _train_points(events), _validation_points(events)
    if not train and not validation:
        raise UserError(f"{folder} has no metrics yet: {METRICS_FILE} holds no training step")
    with _damaged(folder / CONFIG_FILE):
        configured = _configured(folder / CONFIG_FILE)
    checkpoint = _newest_checkpoint(folder)
    told = _told_at_the_end(folder) or _told_so_far(folder, events, configured["train_batch_size"], checkpoint)
    told["world_size"] = told["world_size"] or checkpoint.get("world_size")
    architecture = checkpoint.get("architecture")
    return Run(name, architecture, train=train, validation=validation, **configured, **told)


def _train_points(events: Sequence[Mapping[str, Any]]) -> tuple[TrainPoint, ...]:
    names = tuple(TrainPoint.__dataclass_fields__)
    return tuple(TrainPoint(*(float(event[name]) for name in names)) for event in events if event["event"] == "train")


def _validation_points(events: Sequence[Mapping[str, Any]]) -> tuple[ValidationPoint, ...]:
    return tuple(
        ValidationPoint(
            int(event["step"]), float(event["elapsed_seconds"]), float(event["loss"]), _number(event.get("accuracy"))
        )
        for event in events
        if event["event"] == "validation"
    )


def _configured(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise ValueError("it is not YAML") from None
    return {
        "budget": str(config.get("time_budget") or f"{config['max_steps']:,} steps"),
        "train_batch_size": int(config["train_batch_size"]),
        "learning_rate": float(config["optimizer"]["learning_rate"]),
        "options": leaves(config),
    }


def _newest_checkpoint(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint tells of the run; nothing before the first one."""
    states = sorted(folder.glob("checkpoints/step-*/state.json"))
    if not states:
        return {}
    state, record = (
        read_json(file, "a part of a checkpoint") for file in (states[-1], states[-1].with_name("pretraining.json"))
    )
    with _damaged(states[-1]):
        setting = state["setting"]
        architecture = Architecture(**setting["architecture"])
        return {
            "architecture": architecture,
            "world_size": int(setting["world_size"]),
            "manifest_sha256": setting["manifest_sha256"],
            "hardware": record.get("hardware"),
            "time_budget_seconds": record.get("time_budget_seconds"),
        }


def _told_at_the_end(folder: Path) -> dict[str, Any] | None:
    file = folder / SUMMARY_FILE
    if not file.exists():
        return None
    summary = read_json(file, "the run's summary")
    with _damaged(file):
        return _told(summary)


def _told_so_far(
    folder: Path, events: Sequence[Mapping[str, Any]], train_batch_size: int, checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    last, train = events[-1], [event for event in events if event["event"] == "train"]
    skipped = train[-1].get("skipped_steps", 0) if train else 0
    course = {
        "steps": last["step"],
        "sequences": (last["step"] + skipped) * train_batch_size,
        "epochs": train[-1].get("epoch") if train else None,
        "elapsed_seconds": last["elapsed_seconds"],
        "lost_seconds": lost_seconds(folder),
        "phase": _phase(folder),
    }
    with _damaged(folder / METRICS_FILE):
        return _told({**checkpoint, **course})


def _phase(folder: Path) -> str | None:
    file = folder / STATUS_FILE
    if not file.exists():
        return None
    status = read_json(file, "what the run's processes are doing")
    with _damaged(file):
        return f"{status['phase']}, since {status['since']}"


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Run` that a summary, or what stands in for it, has."""
    spent = record.get("spent_seconds") or {}
    return {
        "hardware": record.get("hardware"),
        "world_size": record.get("world_size"),
        "time_budget_seconds": _number(record.get("time_budget_seconds")),
        "manifest_sha256": record.get("manifest_sha256"),
        "steps": int(record["steps"]),
        "sequences": int(record["sequences"]),
        "epochs": _number(record.get("epochs")),
        "elapsed_seconds": float(record["elapsed_seconds"]),
        "closing_seconds": float(record.get("closing_seconds") or 0),
        "lost_seconds": float(record.get("lost_seconds") or 0),
        "spent_seconds": {part: float(seconds) for part, seconds in spent.items()},
        "stopped_by": record.get("stopped_by"),
        "stopped_because": record.get("stopped_because"),
        "phase": record.get("phase"),
        "final_loss": _number(record.get("validation_loss")),
        "final_accuracy": _number(record.get("validation_accuracy")),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


@contextlib.contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """Tell what is missing or out of place in a file in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged or of another version ({type(error).__name__}: {error})") from None
