"""A search that nobody ran: eight runs of 100 s with a rung of each kind, as they stand when half of it is done."""

from typing import Any

from pretrain.config import PretrainConfig
from pretrain.rungs import Rung
from pretrain.runs import Run, ValidationPoint
from pretrain.search_config import SearchConfig
from pretrain.search_runs import SearchRun

BUDGET = PretrainConfig(time_budget="100s", validation_interval="25%", early_validation_interval=None)
SPACE = {"train_batch_size": [32, 64], "optimizer.learning_rate": [5e-4, 1e-3, 2e-3, 1e-6]}
RUNGS = [Rung("50s", "top 50 %"), Rung("25s", "below 6.0")]
CONFIG = SearchConfig(BUDGET, SPACE, RUNGS)
FACTS = {
    "data_dir": "/data/wikipedia",
    "manifest_sha256": "a" * 64,
    "hardware": "2 x NVIDIA H200",
    "code": "0123abc",
    "versions": {"torch": "2.11.0", "apex": None},
    "gpus_per_run": 2,
    "num_parameters": 4_400_000,
    "budget_seconds": 100.0,
    "importance": {"optimizer.learning_rate": 0.75, "train_batch_size": 0.25},
    "places": 2,
}


def run(number: int, state: str, *losses: float, config: SearchConfig = CONFIG, **fields: Any) -> SearchRun:
    """The run ``number`` of the grid, with a validation every 25 s; the second one is the rung's."""
    curve = tuple((25.0 * place, loss) for place, loss in enumerate(losses, start=1))
    told = {
        "elapsed_seconds": 25.0 * len(losses),
        "steps": 10 * len(losses),
        "curve": curve,
        "starts": bool(losses) + (len(losses) > 2),
        "rung_losses": {"50s": losses[1]} if len(losses) > 1 else {},
    }
    parameters = config.grid()[number] if config.sampler == "grid" else fields.pop("parameters")
    return SearchRun(number, parameters, state, **{**told, **fields})


# Of four runs that have come to 50 s two go on for certain (8 might come, so that four do), one is dropped by itself.
RUNS = (
    run(0, "finished", 5.0, 3.0, 2.5, 2.2, final_loss=2.25, closing_seconds=5.0, lost_seconds=30.0),
    run(1, "finished", 5.0, 2.9, 2.6, 2.0, final_loss=2.0, closing_seconds=5.0),
    run(2, "running", 5.5, 3.1, 2.7, place="node3, GPUs 0-1", started=1000.0),
    run(3, "dropped", 6.5, because="validation_loss has come down to 6.500 after 25s, not to 6"),
    run(4, "paused", 5.5, 3.3),
    run(5, "dropped", 5.9, 4.0, because="rank 6 of 6 at 50s"),
    run(6, "diverged", 5.8, float("nan"), because="the loss is not finite", rung_losses={}),
    run(7, "waiting"),
)


def reference(**fields: Any) -> Run:
    """A run outside the search that fits it."""
    told = {
        "name": "bert-base-settings",
        "architecture": None,
        "hardware": "2 x NVIDIA H200",
        "world_size": 2,
        "budget": "100s",
        "time_budget_seconds": 100.0,
        "train_batch_size": 256,
        "learning_rate": 1e-4,
        "options": {
            "train_batch_size": 256,
            "optimizer.learning_rate": 1e-4,
            "warmup_proportion": 0.111,
            "schedule_length": "300s",
        },
        "manifest_sha256": "a" * 64,
        "steps": 400,
        "sequences": 102_400,
        "epochs": None,
        "elapsed_seconds": 100.0,
        "closing_seconds": 1.0,
        "lost_seconds": 0.0,
        "spent_seconds": {},
        "stopped_by": "time_budget",
        "stopped_because": None,
        "phase": None,
        "final_loss": 3.5,
        "final_accuracy": None,
        "train": (),
        "validation": (ValidationPoint(200, 50.0, 4.0, None), ValidationPoint(400, 100.0, 3.5, None)),
    }
    return Run(**{**told, **fields})
