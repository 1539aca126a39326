"""``python -m pretrain``: each command imports what it needs, because reading a run needs no PyTorch."""

from pathlib import Path

from common.cli import command_parser, config_parser, parse, run_subcommand, take_config
from common.errors import UserError


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


def _plan(argv: list[str]) -> None:
    """What a budget buys, from short trials on this machine or, with --gpu, computed for another."""
    from pretrain.config import PretrainConfig
    from pretrain.hardware import GPUS
    from pretrain.plan import Request, make_plan
    from pretrain.plan_text import describe_plan, write_plan

    parser = config_parser("python -m pretrain plan", _plan.__doc__, PretrainConfig)
    parser.add_argument("--data_dir", type=str, required=True, help="folder made by `python -m data_prep build`")
    parser.add_argument("--num_gpus", type=int | None, default=None, help="processes; default: the GPUs here, or 1")
    parser.add_argument("--gpu", type=str | None, default=None, help=f"compute for this one: {', '.join(GPUS)}")
    parser.add_argument("--price_per_gpu_hour", type=float | None, default=None, help="in any currency")
    parser.add_argument("--presets", type=str | None, default=None, help="to compare, like bert-base,bert-large")
    parser.add_argument("--train_batch_sizes", type=str | None, default=None, help="to compare, like 4096,8192")
    parser.add_argument("--trial_seconds", type=float | None, default=None, help="budget of each trial; default: 60")
    parser.add_argument(
        "--output_dir", type=str | None, default=None, help="for plan.md, plan.json and, meanwhile, the trials"
    )
    arguments = parse(parser, argv)
    folder = Path(arguments.output_dir) if arguments.output_dir else None
    request = Request(
        presets=_names(arguments.presets),
        train_batch_sizes=_numbers(arguments.train_batch_sizes),
        gpu=arguments.gpu,
        num_gpus=arguments.num_gpus,
        price_per_gpu_hour=arguments.price_per_gpu_hour,
        trial_seconds=arguments.trial_seconds,
        folder=folder,
    )
    plan = make_plan(take_config(arguments, PretrainConfig), Path(arguments.data_dir), request)
    text = describe_plan(plan)
    print(text)
    if folder:
        write_plan(plan, text, folder)


def _names(text: str | None) -> list[str] | None:
    """The parts of a list like ``a,b``."""
    return text.replace(",", " ").split() if text else None


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(name) for name in _names(text) or []] or None
    except ValueError:
        raise UserError(f"train_batch_sizes '{text}' is not a list of numbers like 4096,8192") from None


def _search(argv: list[str]) -> int:
    """Try many configurations under one budget, on all GPUs of this machine; exit code 75: the same command goes on."""
    from pretrain.search import run_search
    from pretrain.search_config import SearchConfig

    parser = config_parser("python -m pretrain search", _search.__doc__, SearchConfig)
    parser.add_argument("--data_dir", type=str, required=True, help="folder made by `python -m data_prep build`")
    parser.add_argument(
        "--output_dir", type=str, required=True, help="the search's folder: its runs, report and best.yaml"
    )
    arguments = parse(parser, argv)
    return run_search(take_config(arguments, SearchConfig), Path(arguments.data_dir), Path(arguments.output_dir))


def _status(argv: list[str]) -> int:
    """Tell how a run or a search stands; exit code 0: complete, 75: the same command goes on, 2: neither."""
    from jsonargparse.typing import NonNegativeFloat

    from common.page import markdown_table
    from pretrain.search_runs import is_search
    from pretrain.summary import describe

    parser = command_parser("python -m pretrain status", _status.__doc__)
    parser.add_argument("folder", type=str, help="of a run, or of a search")
    parser.add_argument(
        "--price_per_gpu_hour", type=NonNegativeFloat | None, default=None, help="of a search, in any currency"
    )
    arguments = parse(parser, argv)
    folder = Path(arguments.folder)
    if not is_search(folder):
        line, code = describe(folder)
        print(line)
        return code
    from pretrain.search_record import describe_search  # which takes longer to import

    line, tables, code = describe_search(folder, arguments.price_per_gpu_hour)
    print("\n\n".join([line, *(markdown_table(header, rows) for header, rows in tables)]))
    return code


def _report(argv: list[str]) -> None:
    """Compare runs, or tell of a search, ended or still going: losses, time and cost, as Markdown, HTML and PNG."""
    from pretrain.report import write_report
    from pretrain.search_runs import is_search

    parser = command_parser("python -m pretrain report", _report.__doc__)
    parser.add_argument("folders", type=str, nargs="+", help="of runs; or of one search")
    parser.add_argument(
        "--output_dir", type=str | None, default=None, help="of runs: folder of the report, for it alone"
    )
    parser.add_argument(
        "--references", type=str, nargs="*", default=[], help="of a search: other runs to show beside it"
    )
    parser.add_argument(
        "--price_per_gpu_hour", type=float | None, default=None, help="to tell the cost, in any currency"
    )
    arguments = parse(parser, argv)
    folders, price = [Path(folder) for folder in arguments.folders], arguments.price_per_gpu_hour
    searches = [folder for folder in folders if is_search(folder)]
    if searches and (len(folders) > 1 or arguments.output_dir):
        raise UserError(f"{searches[0]} is a search, whose report goes into its own folder: give it alone")
    if searches:
        from pretrain.search_record import report_search  # which takes longer to import

        file = report_search(folders[0], [Path(run) for run in arguments.references], price)
    elif arguments.references or not arguments.output_dir:
        raise UserError("a report on runs needs --output_dir, and references are for a search")
    else:
        write_report(folders, Path(arguments.output_dir), price)
        file = Path(arguments.output_dir) / "report.html"
    print(f"report: {file}")


COMMANDS = {"plan": _plan, "search": _search, "status": _status, "report": _report, "export": _export}

if __name__ == "__main__":
    run_subcommand("python -m pretrain", "Look after runs, compare them and turn checkpoints into models.", COMMANDS)
