"""The commands on searches as users give them, in this process."""

import contextlib
import io
from pathlib import Path
from typing import Any

import yaml

from common.cli import exit_code
from pretrain.__main__ import COMMANDS
from tests.pretrain.made_machine import RUN_SECONDS

MADE = {
    "pretrain": {
        "model": {"preset": "bert-tiny", "hidden_size": 32},
        "time_budget": None,
        "max_steps": RUN_SECONDS,
        "train_batch_size": 24,
        "micro_batch_size": 4,
        "validation_interval": "12.5%",
        "early_validation_interval": None,
        "checkpoint_interval": "12.5%",
    },
    "space": {"seed": [3, 30, 1, 2]},
    "rungs": [{"at": "25%", "keep": "below 6.5"}, {"at": "50%", "keep": "top 50 %"}],
    "gpus_per_run": 1,
}


def write_config(folder: Path, **changes: Any) -> Path:
    """The made search with other options."""
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump({**MADE, **changes}, sort_keys=False), encoding="utf-8")
    return file


def run_command(name: str, *arguments: object) -> tuple[int, str]:
    """The exit code, and the line that tells an error: one where there is one."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = exit_code(lambda: COMMANDS[name](list(map(str, arguments))))
    lines = errors.getvalue().splitlines()
    assert len(lines) == (code == 2), lines
    return code, "".join(lines)


def refused(answer: tuple[int, str], *words: str) -> None:
    """What :func:`run_command` answers is an error with these words."""
    code, error = answer
    assert code == 2
    assert error.startswith("error: ")
    for word in words:
        assert word in error
