"""``python -m finetune COMMAND``."""

from pathlib import Path
from typing import Literal

from common.cli import command_parser, config_parser, parse, run_subcommand, take_config
from finetune.prune import PruneConfig
from finetune.prune import prune as prune_model
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


def prune(argv: list[str]) -> None:
    """Take attention heads out of a tuned model, as many as the data allow, and fine-tune it again."""
    parser = config_parser("python -m finetune prune", prune.__doc__ or "", PruneConfig)
    parser.usage = "%(prog)s --model M --output_dir O [--key value ...]"
    parser.add_argument("--model", type=str, required=True, help="a tuned classifier: its Hugging Face folder")
    parser.add_argument("--output_dir", type=str, required=True, help="becomes the pruned model's folder; continues")
    parser.add_argument("--glue_dir", type=str, help="folder of the official TSV files; default: from the hub")
    parser.add_argument(
        "--full_size", type=str, help="make this folder too: the same with zeros for removed heads, for transformers"
    )
    arguments = parse(parser, argv)
    prune_model(
        take_config(arguments, PruneConfig),
        model=arguments.model,
        output_dir=Path(arguments.output_dir),
        glue_dir=Path(arguments.glue_dir) if arguments.glue_dir else None,
        full_size_dir=Path(arguments.full_size) if arguments.full_size else None,
    )


def check(argv: list[str]) -> None:
    """Prove that a zip is what GLUE's server takes: files, headers, rows, labels."""
    parser = command_parser("python -m finetune check-submission", check.__doc__ or "")
    parser.add_argument("zip", type=str, help="the submission")
    path = Path(parse(parser, argv).zip)
    check_submission(path)
    print(f"{path} is complete and in the server's format")


if __name__ == "__main__":
    commands = {"report": report, "status": status, "submit": submit, "prune": prune, "check-submission": check}
    run_subcommand("python -m finetune", "Fine-tune on GLUE and report the scores.", commands)
