"""The command line of every stage: typed dataclass <- YAML file <- --key value; one clear line for what is wrong."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jsonargparse

from common.errors import UserError

Config = TypeVar("Config")

_RANK_0_SPEAKS_SECONDS = 2.0  # a launcher ends all processes as soon as the first one leaves

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def config_parser(prog: str, description: str, config_class: type) -> jsonargparse.ArgumentParser:
    """A parser whose options are the fields of ``config_class`` (a dataclass), settable from ``--config FILE`` too.

    Unknown keys are refused. ``--local_rank``, which launchers add, is accepted and ignored: the environment tells it.
    Callers add their own options (folders) to the returned parser.
    """
    parser = command_parser(prog, description)
    parser.usage = "%(prog)s --config FILE [--key value ...]"
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config_class, as_group=False)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def command_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser for a command without a configuration file."""
    return jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


def parse(parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None) -> jsonargparse.Namespace:
    """Parse ``argv`` (default: the process's own arguments) and build the dataclasses.

    Raises:
        UserError: an option is unknown, missing or of the wrong type, in the file or on the command line.
    """
    try:
        return parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, ValueError) as error:  # ValueError: a nested dataclass's own checks
        raise UserError(f"{_one_line(str(error))}; see '{parser.prog} --help'") from None


def take_config(arguments: jsonargparse.Namespace, config_class: type[Config]) -> Config:
    """The ``config_class`` instance whose fields lie at the top level of ``arguments``.

    Raises:
        UserError: the class's own checks (``ValueError`` in ``__post_init__``) refuse a value.
    """
    try:
        return config_class(**{name: arguments[name] for name in config_class.__dataclass_fields__})
    except ValueError as error:
        raise UserError(str(error)) from None


def run(command: Callable[[], Any]) -> None:
    """Run a command and leave with its exit code, see :func:`exit_code`."""
    if code := exit_code(command):
        sys.exit(code)


def exit_code(command: Callable[[], Any]) -> int:
    """Run a command: one line and its code (2) for a :class:`UserError`, 130 for Ctrl-C, a traceback for a bug.

    Otherwise what the command returns, if that is a number, and 0 if not.
    """
    try:
        result = command()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_RANK_0_SPEAKS_SECONDS)  # its launcher ends this process if rank 0 met the same and said so
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def run_subcommand(prog: str, description: str, subcommands: dict[str, Callable[[list[str]], Any]]) -> NoReturn:
    """Dispatch ``python -m package SUBCOMMAND ...`` to one of ``subcommands``, whose docstrings are the help text."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...\n\n{description}\n\ncommands:")
        for name, function in subcommands.items():
            print(f"  {name:<16}{(function.__doc__ or '').strip().splitlines()[0]}")
        print(f"\n'{prog} COMMAND --help' tells a command's options.")
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in subcommands:
        print(f"error: {prog} has no command '{name}'; it has: {', '.join(subcommands)}", file=sys.stderr)
        sys.exit(2)
    run(lambda: subcommands[name](rest))
    sys.exit(0)


def _one_line(message: str) -> str:
    """jsonargparse's indented, multi-line message as one readable line."""
    message = re.sub(r"Problem with given class_path '[\w.]*\.(\w+)':", r"\1:", message)
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message).replace("<class ", "").replace("'>", "'")
    return re.sub(r"\s+", " ", message).strip()
