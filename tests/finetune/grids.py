"""A small grid on small tasks, and what it found out."""

import json
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "seeds": [1, 2],
    "max_seq_length": 32,
    "grids": [{"tasks": ["sst2", "stsb"], "learning_rate": [1e-3, 3e-3], "batch_size": [8], "num_epochs": [4]}],
    "random_baseline": True,
    "num_workers": 2,
}
NUM_TRIALS = 2 * 2 * 2 * 2
_OF_ITS_TIME = ("rows_per_second", "worker", "finished_at")


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def arguments(config: Path, model: Path, output_dir: Path, glue_dir: Path, *more: str) -> list[str]:
    folders = ["--model", str(model), "--output_dir", str(output_dir), "--glue_dir", str(glue_dir)]
    return ["--config", str(config), *folders, *more]


def output_of(argv: list[str]) -> Path:
    return Path(argv[argv.index("--output_dir") + 1])


def elsewhere(argv: list[str], output_dir: Path) -> list[str]:
    """The same command with another output folder."""
    return [str(output_dir) if argument == str(output_of(argv)) else argument for argument in argv]


def outcome(output_dir: Path) -> dict[str, Any]:
    """What a grid found out, without when and how fast it did."""
    return _timeless(json.loads((output_dir / "results.json").read_text()))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _timeless(part) for name, part in value.items() if name not in _OF_ITS_TIME and "seconds" not in name
        }
    return [_timeless(part) for part in value] if isinstance(value, list) else value
