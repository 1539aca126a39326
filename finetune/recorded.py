"""What the trials of a grid have brought so far, from the storage alone: results, report, progress."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from common.folders import CONFIG_FILE, write_json
from common.page import markdown_table
from common.storage import sqlite_file
from finetune.config import GridConfig
from finetune.progress import look
from finetune.report import write_report
from finetune.results import Results, cell_of, make_results
from finetune.score_tables import latex_row, score_tables
from finetune.study import TrialStore
from finetune.trial import Cell

RESULTS_FILE: Final = "results.json"
STORAGE_FILE: Final = "trials.db"
_MISSING_SHOWN: Final = 3


def storage_url(config: GridConfig, output_dir: Path) -> str:
    """Where the grid's trials are."""
    return config.storage or f"sqlite:///{(output_dir / STORAGE_FILE).resolve()}"


def render(config: GridConfig, output_dir: Path) -> Results:
    """Write ``results.json`` and the report from the recorded trials, and print the scores.

    Raises:
        UserError: no trial has been recorded.
    """
    results = collect(config, output_dir)
    write_json(output_dir / RESULTS_FILE, results)
    write_report(output_dir, results)
    for title, table in score_tables(results):
        print(f"{title}\n\n{markdown_table(*table)}\n")
    print(f"{output_dir / RESULTS_FILE}\n{output_dir / 'report.html'}")
    return results


def collect(config: GridConfig, output_dir: Path) -> Results:
    """The content of ``results.json``, from the storage alone.

    Raises:
        UserError: no trial has been recorded.
    """
    store, cells = _recorded(config, output_dir)
    facts = {name: store.facts(name) for name in cells}
    first = next(iter(facts.values()))
    return make_results(
        tasks=config.tasks,
        facts={
            **{name: first[name] for name in ("model", "model_sha256", "protocol", "precisions")},
            "mnli_init": config.mnli_init,
            "rows": {name: facts[name]["rows"] for name in cells},
            "limited_rows": {name: facts[name]["limited_rows"] for name in cells},
            "tokens_per_row": {
                name: facts[name]["num_tokens"]["train"] / facts[name]["rows"]["train"] for name in cells
            },
        },
        cells=cells,
        trials={cell: result for name in cells for cell, result in store.results(name).items()},
        failures=[failure for name in cells for failure in store.failures(name)],
    )


def print_latex(output_dir: Path) -> None:
    """Print the scores as a row of a LaTeX table in the order of the paper's Table 3.

    Raises:
        UserError: the folder is not the output of a grid, or no trial has been recorded.
    """
    print(latex_row(collect(recorded_config(output_dir), output_dir)))


def _recorded(config: GridConfig, output_dir: Path) -> tuple[TrialStore, dict[str, list[Cell]]]:
    """The storage, and the cells of the tasks that have a study there."""
    file = sqlite_file(storage_url(config, output_dir))
    if file is not None and not file.exists():
        raise UserError(f"no trial has been recorded in {output_dir}: run run_glue_grid.py first")
    store = TrialStore(storage_url(config, output_dir))
    names = store.task_names()
    if not names:
        raise UserError(f"no trial has been recorded in {output_dir}: run run_glue_grid.py first")
    cells = config.cells(store.facts(names[0])["precisions"])
    return store, {name: task_cells for name, task_cells in cells.items() if name in names}


def recorded_config(output_dir: Path) -> GridConfig:
    """The configuration with which the grid in this folder was run.

    Raises:
        UserError: the folder is not the output of a grid.
    """
    file = output_dir / CONFIG_FILE
    if not file.exists() or "grids:" not in file.read_text(encoding="utf-8"):
        raise UserError(f"{output_dir} is not the output of run_glue_grid.py, nor of a training of 'finetune train'")
    parser = config_parser("run_glue_grid.py", "", GridConfig)
    return take_config(parse(parser, ["--config", str(file)]), GridConfig)


def print_status(output_dir: Path) -> None:
    """Print how far the grid in this folder is; it may be running.

    Raises:
        UserError: the folder is not the output of a grid, or no trial has been recorded.
    """
    config = recorded_config(output_dir)
    store, cells = _recorded(config, output_dir)
    progress = look(store, config.tasks, cells)
    print(f"{progress.line()}\n\n{markdown_table(*progress.table())}")
    for attempt in progress.running:
        print(f"running since {attempt.started:%H:%M:%S}: {attempt.cell}, {attempt.worker}")


def refuse_missing(results: Results, task_names: Sequence[str]) -> None:
    """Name the cells of these tasks that have no result.

    Raises:
        UserError: there are any.
    """
    missing = [entry for entry in results["missing"] if entry["task_name"] in task_names]
    if not missing:
        return
    shown = "; ".join(f"{cell_of(entry)}: {entry['cause']}" for entry in missing[:_MISSING_SHOWN])
    more = f"; and {len(missing) - _MISSING_SHOWN} more" if len(missing) > _MISSING_SHOWN else ""
    raise UserError(
        f"no median without every trial, and {len(missing)} have no result: {shown}{more}."
        " The same command tries them again"
    )
