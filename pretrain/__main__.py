"""``python -m pretrain export``."""

from pathlib import Path

from common.cli import command_parser, parse, run_subcommand
from pretrain.checkpoint import find_checkpoint
from pretrain.export import export


def _export(argv: list[str]) -> None:
    """Write a checkpoint as a Hugging Face model folder."""
    parser = command_parser("python -m pretrain export", _export.__doc__)
    parser.add_argument("checkpoint", type=str, help="R/checkpoints/step-..., or a run's folder R: its newest one")
    parser.add_argument("folder", type=str, help="the model folder to make")
    arguments = parse(parser, argv)
    checkpoint, folder = find_checkpoint(Path(arguments.checkpoint)), Path(arguments.folder).resolve()
    export(checkpoint, folder)
    print(f"{folder}: the model of {checkpoint}")


COMMANDS = {"export": _export}

if __name__ == "__main__":
    run_subcommand("python -m pretrain", "Turn checkpoints into models.", COMMANDS)
