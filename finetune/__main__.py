"""``python -m finetune COMMAND``."""

from pathlib import Path

from common.cli import command_parser, parse, run_subcommand
from finetune.grid import render_recorded


def report(argv: list[str]) -> None:
    """Render results.json, report.md and report.html again from the recorded trials."""
    parser = command_parser("python -m finetune report", report.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py")
    render_recorded(Path(parse(parser, argv).folder))


if __name__ == "__main__":
    run_subcommand("python -m finetune", "Fine-tune on GLUE and report the scores.", {"report": report})
