"""``python -m pretrain``: each command imports what it needs, because reading a run needs no PyTorch."""

from pathlib import Path

from common.cli import command_parser, parse, run_subcommand


def _export(argv: list[str]) -> None:
    """Write a checkpoint as a Hugging Face model folder."""
    from pretrain.checkpoint import find_checkpoint
    from pretrain.export import export

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
    from pretrain.summary import describe

    parser = command_parser("python -m pretrain status", _status.__doc__)
    parser.add_argument("run", type=str, help="the run's folder")
    line, code = describe(Path(parse(parser, argv).run))
    print(line)
    return code


def _report(argv: list[str]) -> None:
    """Compare runs, ended or still going: losses, speed, time and cost, as Markdown, HTML and PNG."""
    from pretrain.report import write_report

    parser = command_parser("python -m pretrain report", _report.__doc__)
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs")
    parser.add_argument("--output_dir", type=str, required=True, help="folder of the report, for it alone")
    parser.add_argument("--price_per_gpu_hour", type=float, default=None, help="to tell the cost, in any currency")
    arguments = parse(parser, argv)
    output_dir = Path(arguments.output_dir)
    write_report([Path(run) for run in arguments.runs], output_dir, arguments.price_per_gpu_hour)
    print(f"report: {output_dir / 'report.html'}")


COMMANDS = {"export": _export, "status": _status, "report": _report}

if __name__ == "__main__":
    run_subcommand("python -m pretrain", "Look after runs, compare them and turn checkpoints into models.", COMMANDS)
