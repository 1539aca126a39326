"""``python -m data_prep build | inspect | verify | demo_benchmark``."""

from pathlib import Path

from common.cli import command_parser, config_parser, parse, run_subcommand, take_config
from data_prep.build import DataConfig, build
from data_prep.demo_benchmark import write_demo_benchmark
from data_prep.inspect import inspect_folder, summary, verify
from data_prep.shards import read_manifest


def _build(argv: list[str]) -> None:
    """Text to a folder of masked, shuffled HDF5 shards; continues where it stopped."""
    parser = config_parser("python -m data_prep build", _build.__doc__, DataConfig)
    parser.add_argument("--output_dir", type=str, required=True, help="the data folder to make")
    arguments = parse(parser, argv)
    folder = Path(arguments.output_dir)
    build(take_config(arguments, DataConfig), folder)
    print(summary(read_manifest(folder)))


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


def _demo_benchmark(argv: list[str]) -> None:
    """Write the synthetic benchmark of the demo, in GLUE's file layouts."""
    parser = command_parser("python -m data_prep demo_benchmark", _demo_benchmark.__doc__)
    parser.add_argument("--output_dir", type=str, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=42, help="of the rows and of the words that training rows show")
    arguments = parse(parser, argv)
    write_demo_benchmark(Path(arguments.output_dir), arguments.seed)
    print(f"{arguments.output_dir}: a synthetic benchmark (not GLUE)")


COMMANDS = {"build": _build, "inspect": _inspect, "verify": _verify, "demo_benchmark": _demo_benchmark}

if __name__ == "__main__":
    run_subcommand("python -m data_prep", "Prepare data for masked language modelling.", COMMANDS)
