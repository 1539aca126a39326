"""``python -m finetune COMMAND``."""

from pathlib import Path
from typing import Literal

from common.cli import command_parser, parse, run_subcommand
from finetune.publish import publish_run
from finetune.recorded import print_latex, print_status, recorded_config, render
from finetune.submission import check_submission
from finetune.submit import submit as write


def report(argv: list[str]) -> None:
    """Render results.json, report.md and report.html again from the recorded trials."""
    parser = command_parser("python -m finetune report", report.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py")
    parser.add_argument("--latex", action="store_true", help="only print the scores as a row of a LaTeX table")
    arguments = parse(parser, argv)
    folder = Path(arguments.folder)
    if arguments.latex:
        print_latex(folder)
    else:
        render(recorded_config(folder), folder)


def status(argv: list[str]) -> None:
    """Tell how far a grid is, while it runs or afterwards."""
    parser = command_parser("python -m finetune status", status.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py")
    print_status(Path(parse(parser, argv).folder))


def submit(argv: list[str]) -> None:
    """Predict GLUE's test sets with the kept models and write submission.zip; trains nothing."""
    parser = command_parser("python -m finetune submit", submit.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py, all of whose trials are done")
    parser.add_argument("--glue_dir", type=str, help="folder of the official TSV files; default: from the hub")
    parser.add_argument(
        "--start", type=Literal["pretrained", "mnli"], help="which models of RTE, MRPC and STS-B, if the grid has both"
    )
    parser.add_argument(
        "--placeholders", action="store_true", help="fill the files of tasks without a result with the majority label"
    )
    arguments = parse(parser, argv)
    glue_dir = Path(arguments.glue_dir) if arguments.glue_dir else None
    write(Path(arguments.folder), glue_dir, arguments.start, arguments.placeholders)


def check(argv: list[str]) -> None:
    """Prove that a zip is what GLUE's server takes: files, headers, rows, labels."""
    parser = command_parser("python -m finetune check-submission", check.__doc__ or "")
    parser.add_argument("zip", type=str, help="the submission")
    path = Path(parse(parser, argv).zip)
    check_submission(path)
    print(f"{path} is complete and in the server's format")


def publish(argv: list[str]) -> None:
    """Send a tuned model, its records and a card made from them to the Hugging Face hub."""
    parser = command_parser("python -m finetune publish", publish.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of train or of a grid, or any model with its record")
    parser.add_argument("--repo_id", type=str, required=True, help="the repository on the hub: user/name")
    parser.add_argument("--task_name", type=str, help="whose model, if the folder has several")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--license", type=str, help="for the card, from the hub's list, such as apache-2.0")
    parser.add_argument("--dry_run", action="store_true", help="show every file and the card, and send nothing")
    arguments = parse(parser, argv)
    publish_run(
        Path(arguments.folder),
        arguments.repo_id,
        arguments.private,
        arguments.task_name,
        arguments.license,
        arguments.dry_run,
    )


if __name__ == "__main__":
    commands = {"report": report, "status": status, "submit": submit, "check-submission": check, "publish": publish}
    run_subcommand("python -m finetune", "Fine-tune on GLUE and report the scores.", commands)
