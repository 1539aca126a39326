"""What a run's folder tells of its course. Reading needs neither PyTorch nor DeepSpeed, which are slow to start."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
STATUS_FILE = "status.json"
COMPLETE = ("time_budget", "max_steps", "early_stop")
"""The values of ``stopped_by`` after which nothing is left to do."""
PAUSE = "pause"
"""The value of ``stopped_by`` at ``pause_at``: all is validated and saved, and the run goes on with a later mark."""
_EVENT_KEYS = {"event", "step", "elapsed_seconds"}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order, without those that a later start took back by going on from an earlier step."""
    events: list[dict[str, Any]] = []
    for event in _all_events(folder):
        if event["event"] == "start":
            events = [earlier for earlier in events if earlier["step"] <= event["step"]]
        events.append(event)
    return events


def lost_seconds(folder: Path) -> float:
    """Seconds of work that kills have destroyed: what the record shows beyond the point where each start went on."""
    lost = furthest = 0.0
    for event in _all_events(folder):
        if event["event"] == "start":
            lost += max(0.0, furthest - event["elapsed_seconds"])
            furthest = event["elapsed_seconds"]
        furthest = max(furthest, event["elapsed_seconds"])
    return lost


def _all_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of the record; one that a kill cut short is passed over."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            event = json.loads(line)
            if isinstance(event, dict) and event.keys() >= _EVENT_KEYS:
                yield event


def curves(events: list[dict[str, Any]], max_points: int = 500) -> dict[str, list[dict[str, float]]]:
    """Training and validation curves, thinned to at most about ``max_points`` points each, the last one always kept."""
    fields = {
        "train": ("elapsed_seconds", "step", "loss", "learning_rate"),
        "validation": ("elapsed_seconds", "step", "loss"),
    }
    result = {}
    for name, keys in fields.items():
        points = [{key: event[key] for key in keys} for event in events if event["event"] == name]
        stride = max(1, len(points) // max_points)
        result[name] = points[::-1][::stride][::-1]
    return result
