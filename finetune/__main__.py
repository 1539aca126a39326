"""``python -m finetune COMMAND``."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from common.cli import command_parser, config_parser, parse, run_subcommand, take_config
from common.errors import UserError
from common.hub import model_folder
from finetune.predict import predict_file, predict_texts
from finetune.predictor import Predictor
from finetune.prune import PruneConfig
from finetune.prune import prune as prune_model
from finetune.publish import publish_run
from finetune.quantize import quantize_model
from finetune.recorded import print_latex, print_status, recorded_config, render
from finetune.submission import check_submission
from finetune.submit import submit as write
from finetune.train import train as run_train
from finetune.train_flags import read_flags


def report(argv: list[str]) -> None:
    """Render results.json, report.md and report.html again from the recorded trials."""
    parser = command_parser("python -m finetune report", report.__doc__ or "")
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py or train")
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
    parser.add_argument("folder", type=str, help="output folder of run_glue_grid.py or train")
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
        "--full_size",
        action="store_true",
        help="make output_dir/full_size too: the same with zeros for removed heads, for stock transformers",
    )
    arguments = parse(parser, argv)
    prune_model(
        take_config(arguments, PruneConfig),
        model=arguments.model,
        output_dir=Path(arguments.output_dir),
        glue_dir=Path(arguments.glue_dir) if arguments.glue_dir else None,
        with_full_size=arguments.full_size,
    )


def check(argv: list[str]) -> None:
    """Prove that a zip is what GLUE's server takes: files, headers, rows, labels."""
    parser = command_parser("python -m finetune check-submission", check.__doc__ or "")
    parser.add_argument("zip", type=str, help="the submission")
    path = Path(parse(parser, argv).zip)
    check_submission(path)
    print(f"{path} is complete and in the server's format")


def predict(argv: list[str]) -> None:
    """Predict labels with their probabilities, or scores, for texts or for a file of rows."""
    parser = command_parser("python -m finetune predict", predict.__doc__ or "")
    parser.add_argument("model", type=str, help="folder of a tuned model, pruned and quantised ones too, or hub id")
    parser.add_argument("texts", type=str, nargs="*", help="a text, or a pair as 'text | its pair'")
    parser.add_argument("--input_file", type=str, help="rows to predict: .csv, .tsv (no quoting) or .jsonl")
    parser.add_argument("--output_file", type=str, help="the same columns and the predictions: .csv, .tsv or .jsonl")
    parser.add_argument("--text_column", type=str, help="default: the task's, else text, sentence or the only column")
    parser.add_argument("--pair_column", type=str, help="column of the second text; default: the task's")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="rows computed at a time")
    parser.add_argument("--max_seq_length", type=PositiveInt, help="tokens of a row; default: as the model was tuned")
    arguments = parse(parser, argv)
    of_file = (arguments.output_file, arguments.text_column, arguments.pair_column)
    if bool(arguments.texts) == bool(arguments.input_file):
        raise UserError("give texts or an --input_file, one of the two")
    if arguments.texts and any(of_file):
        raise UserError("--output_file, --text_column and --pair_column go with --input_file")
    if arguments.input_file and not arguments.output_file:
        raise UserError("--input_file needs an --output_file")
    predictor = Predictor(model_folder(arguments.model, "MODEL"), arguments.max_seq_length)
    if arguments.texts:
        predict_texts(predictor, arguments.texts, arguments.batch_size)
    else:
        files = Path(arguments.input_file), Path(arguments.output_file)
        predict_file(predictor, *files, arguments.text_column, arguments.pair_column, arguments.batch_size)


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


def quantize(argv: list[str]) -> None:
    """Make a tuned model's int8 form, and measure score, size and latency before and after."""
    parser = command_parser("python -m finetune quantize", quantize.__doc__ or "")
    parser.add_argument("--model", type=str, required=True, help="folder of a tuned model, or hub id")
    parser.add_argument("--output_dir", type=str, required=True, help="becomes the quantised model's folder")
    parser.add_argument("--glue_dir", type=str, help="folder of the official TSV files; default: from the hub")
    parser.add_argument("--task_name", type=str, help="of a model that has no record of its task")
    parser.add_argument("--no_compile", action="store_true", help="time the models as they are, not compiled too")
    arguments = parse(parser, argv)
    glue_dir = Path(arguments.glue_dir) if arguments.glue_dir else None
    quantize_model(arguments.model, Path(arguments.output_dir), glue_dir, arguments.task_name, not arguments.no_compile)


def train(argv: list[str]) -> None:
    """Fine-tune on a task or on your own data, once or with several seeds, with run_glue's flags."""
    run_train(read_flags(argv))


if __name__ == "__main__":
    commands = {
        "train": train,
        "predict": predict,
        "prune": prune,
        "publish": publish,
        "quantize": quantize,
        "report": report,
        "status": status,
        "submit": submit,
        "check-submission": check,
    }
    run_subcommand("python -m finetune", "Fine-tune tasks of GLUE or your own, and use what comes out.", commands)
