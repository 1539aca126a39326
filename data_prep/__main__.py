"""``python -m data_prep plan | build | inspect | verify | train_tokenizer | convert | index | demo_benchmark``."""

from pathlib import Path

from common.cli import command_parser, config_parser, parse, run_subcommand, take_config
from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.convert import convert, index
from data_prep.demo_benchmark import write_demo_benchmark
from data_prep.inspect import inspect_folder, summary, verify
from data_prep.plan import make_plan
from data_prep.shards import read_manifest
from data_prep.tokenizer import TokenizerConfig, make_tokenizer


def _build(argv: list[str]) -> None:
    """Text to a folder of masked, shuffled HDF5 shards; continues where it stopped."""
    parser = config_parser("python -m data_prep build", _build.__doc__, DataConfig)
    parser.add_argument("--output_dir", type=str, required=True, help="the data folder to make")
    arguments = parse(parser, argv)
    folder = Path(arguments.output_dir)
    build(take_config(arguments, DataConfig), folder)
    print(summary(read_manifest(folder)))


def _plan(argv: list[str]) -> None:
    """What a build will take and give, and how long its rows last, told from a sample of the sources."""
    parser = config_parser("python -m data_prep plan", _plan.__doc__, DataConfig)
    parser.add_argument("--num_gpus", type=int, default=8, help="GPUs that will train")
    parser.add_argument(
        "--sequences_per_second", type=float, default=136.0, help="that one GPU trains; 24hBERT's Titan-V: 136"
    )
    parser.add_argument("--sample_megabytes", type=float, default=8.0, help="text to sample of each source")
    arguments = parse(parser, argv)
    config = take_config(arguments, DataConfig)
    if min(arguments.num_gpus, arguments.sequences_per_second, arguments.sample_megabytes) <= 0:
        raise UserError("num_gpus, sequences_per_second and sample_megabytes must be above 0")
    plan = make_plan(config, arguments.sample_megabytes)
    print(plan.describe(config, arguments.num_gpus, arguments.sequences_per_second))


def _train_tokenizer(argv: list[str]) -> None:
    """Train a WordPiece vocabulary on the sources, for a language or a domain of your own."""
    parser = config_parser("python -m data_prep train_tokenizer", _train_tokenizer.__doc__, TokenizerConfig)
    parser.add_argument("--output_dir", type=str, required=True, help="the tokenizer folder to make")
    arguments = parse(parser, argv)
    folder = Path(arguments.output_dir)
    make_tokenizer(take_config(arguments, TokenizerConfig), folder)
    print(f"{folder}: give it as 'tokenizer' to build")


def _inspect(argv: list[str]) -> None:
    """What is in a data folder, with a few rows decoded and their masks shown."""
    parser = command_parser("python -m data_prep inspect", _inspect.__doc__)
    parser.add_argument("folder", type=str, help="a data folder")
    parser.add_argument("--num_rows", type=int, default=3, help="training rows to show")
    arguments = parse(parser, argv)
    print(inspect_folder(Path(arguments.folder), arguments.num_rows))


def _verify(argv: list[str]) -> None:
    """Check every byte of a data folder against its manifest."""
    parser = command_parser("python -m data_prep verify", _verify.__doc__)
    parser.add_argument("folder", type=str, help="a data folder")
    folder = Path(parse(parser, argv).folder)
    manifest = read_manifest(folder)
    verify(manifest)
    print(f"{folder}: all {len(manifest.shards)} shards are as they were written")


def _convert(argv: list[str]) -> None:
    """Write a data folder's rows as shards for the trainers of NVIDIA and 24hBERT."""
    parser = command_parser("python -m data_prep convert", _convert.__doc__)
    parser.add_argument("folder", type=str, help="a data folder")
    parser.add_argument("--output_dir", type=str, required=True, help="the folder for the shards")
    arguments = parse(parser, argv)
    convert(Path(arguments.folder), Path(arguments.output_dir))
    print(f"{arguments.output_dir}: the rows of {arguments.folder} in the layout of NVIDIA and 24hBERT")


def _index(argv: list[str]) -> None:
    """Make a folder of shards of NVIDIA or 24hBERT a data folder, to train on as it is."""
    parser = command_parser("python -m data_prep index", _index.__doc__)
    parser.add_argument("folder", type=str, help="the folder of their shards")
    parser.add_argument("--tokenizer", type=str, required=True, help="that made them: hub id, folder or file")
    arguments = parse(parser, argv)
    manifest = index(Path(arguments.folder), arguments.tokenizer)
    print(summary(manifest))
    if pairs := manifest.content["num_pairs"]:
        print(f"{pairs:,} rows are pairs of texts (next-sentence prediction): each is read as one text")


def _demo_benchmark(argv: list[str]) -> None:
    """Write the synthetic benchmark of the demo, in GLUE's file layouts."""
    parser = command_parser("python -m data_prep demo_benchmark", _demo_benchmark.__doc__)
    parser.add_argument("--output_dir", type=str, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=42, help="of the rows and of the words that training rows show")
    arguments = parse(parser, argv)
    write_demo_benchmark(Path(arguments.output_dir), arguments.seed)
    print(f"{arguments.output_dir}: a synthetic benchmark (not GLUE)")


COMMANDS = {
    "plan": _plan,
    "build": _build,
    "inspect": _inspect,
    "verify": _verify,
    "train_tokenizer": _train_tokenizer,
    "convert": _convert,
    "index": _index,
    "demo_benchmark": _demo_benchmark,
}

if __name__ == "__main__":
    run_subcommand("python -m data_prep", "Prepare data for masked language modelling.", COMMANDS)
