"""``python -m pretrain export | status``."""

from pathlib import Path

from common.cli import command_parser, parse, run_subcommand
from pretrain.checkpoint import find_checkpoint
from pretrain.export import export
from pretrain.summary import describe


def _export(argv: list[str]) -> None:
    """Write a checkpoint as a Hugging Face model folder."""
    parser = command_parser("python -m pretrain export", _export.__doc__)
    parser.add_argument(
        "checkpoint",
        type=str,
        help="R/checkpoints/step-..., R/checkpoints/best, or a run's folder R: its newest one",
    )
    parser.add_argument("folder", type=str, help="the model folder to make")
    arguments = parse(parser, argv)
    checkpoint, folder = find_checkpoint(Path(arguments.checkpoint)), Path(arguments.folder).resolve()
    export(checkpoint, folder)
    print(f"{folder}: the model of {checkpoint}")


def _status(argv: list[str]) -> int:
    """Tell how a run stands; exit code 0: complete, 75: the same command goes on, 2: no run."""
    parser = command_parser("python -m pretrain status", _status.__doc__)
    parser.add_argument("run", type=str, help="the run's folder")
    line, code = describe(Path(parse(parser, argv).run))
    print(line)
    return code


COMMANDS = {"export": _export, "status": _status}

if __name__ == "__main__":
    run_subcommand("python -m pretrain", "Look after runs and turn checkpoints into models.", COMMANDS)
