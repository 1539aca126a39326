"""What a search has brought so far, from its folder and its storage: how it stands, report, best configuration."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from common.folders import CONFIG_FILE, writer_of
from common.page import HTML_FILE
from common.storage import sqlite_file
from pretrain.runs import read_runs
from pretrain.sampling import importance
from pretrain.search_config import SearchConfig
from pretrain.search_progress import Progress, Table, look
from pretrain.search_report import write_report
from pretrain.search_results import check_references, write_best
from pretrain.search_runs import UNFINISHED
from pretrain.study import SearchStore
from pretrain.summary import GOES_ON

STORAGE_FILE: Final = "trials.db"


def storage_url(config: SearchConfig, output_dir: Path) -> str:
    """Of the storage that is configured, or of the file in the search's own folder."""
    return config.storage or f"sqlite:///{(output_dir / STORAGE_FILE).resolve()}"


def is_there(url: str) -> bool:
    """Whether a storage may hold something: a file that does not exist is not made by looking."""
    file = sqlite_file(url)
    return file is None or file.exists()


def _read_search(folder: Path) -> tuple[SearchConfig, SearchStore]:
    """What a search is and where it stands.

    Raises:
        UserError: its storage is not there.
    """
    parser = config_parser("config.yaml", "", SearchConfig)
    config = take_config(parse(parser, ["--config", str(folder / CONFIG_FILE)]), SearchConfig)
    url = storage_url(config, folder)
    store = SearchStore(url, config) if is_there(url) else None
    if store is None or not store.reopen():
        raise UserError(f"{folder} has no runs yet: its search has been stopped before it began")
    return config, store


def describe_search(folder: Path, price_per_gpu_hour: float | None = None) -> tuple[str, list[Table], int]:
    """How a search stands: a line, tables (header and rows), and the exit code: 0 where it is over, else 75."""
    config, store = _read_search(folder)
    runs = store.runs()
    goes_on = (*UNFINISHED, "failed")  # what has failed is tried again
    is_over = len(runs) >= config.num_planned and not any(run.state in goes_on for run in runs)
    stands_still = not store.serves_machines and not is_over and writer_of(folder) is None
    if stands_still:  # what was running when the command was killed
        runs = [replace(run, state="waiting", place=None) if run.state == "running" else run for run in runs]
    progress = look(config, store.facts(), runs, time.time(), price_per_gpu_hour)
    line = progress.line() + ("\nno command is at work on it: the same command goes on" if stands_still else "")
    return line, progress.tables(), 0 if is_over else GOES_ON


def report_search(folder: Path, references: Sequence[Path] = (), price_per_gpu_hour: float | None = None) -> Path:
    """Write the report of a search, over or under way, into its folder.

    Args:
        folder: the search's.
        references: folders of other runs to show beside it, of the same data, budget and hardware.
        price_per_gpu_hour: of one device, in any currency.

    Raises:
        UserError: a reference can't stand beside the search's runs.
    """
    config, store = _read_search(folder)
    render(config, store, folder, references, price_per_gpu_hour)
    return folder / HTML_FILE


def render(
    config: SearchConfig,
    store: SearchStore,
    folder: Path,
    references: Sequence[Path] = (),
    price_per_gpu_hour: float | None = None,
) -> Progress:
    """Write report and best configuration, and tell how the search stands."""
    runs = store.runs()
    others = read_runs(references)
    facts = {**store.facts(), "importance": importance(config.space, runs)}
    check_references(config, facts, others)
    write_report(config, facts, runs, others, folder, price_per_gpu_hour)
    write_best(config, runs, folder)
    return look(config, facts, runs, time.time(), price_per_gpu_hour)
