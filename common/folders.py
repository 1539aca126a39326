"""Folders that survive kills and explain themselves: atomic writes, checksums, and the record of how one was made."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError

_LOCK_LOOK_SECONDS = 0.5
_TORCH_WRITER = "inline_container"  # in what torch.save says of a full disk
CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.(?P<kind>tmp|old)")  # as atomic_path names them
_SHOWN_CHARACTERS = 60  # of a value that differs
_RECORDED_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "h5py", "numpy", "optuna")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write a file or folder to; it takes the real name only on success.

    A file or folder of that name is replaced.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # no other process or machine has this name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if path.is_dir():  # a folder can't be renamed over another
            replaced = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            os.rename(path, replaced)
            os.rename(temporary, path)
            _remove(replaced)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or nothing."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; ``what`` names it for people.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): {what}") from None


def sha256_of_file(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_undamaged(path: Path, sha256: str) -> bool:
    """Whether the file is there, byte by byte as it was."""
    return path.is_file() and sha256_of_file(path) == sha256


@contextlib.contextmanager
def errors_of_writing(folder: Path) -> Iterator[None]:
    """Tell a full disk, or a folder that can't be written to, in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and _TORCH_WRITER not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"can't write to {folder} ({reason}): mend that and run the same "
            "command again, which goes on from here, or give another --output_dir"
        ) from None


def require_folder(path: Path, what: str) -> Path:
    """``path`` if it is a folder; a clear line that names it as ``what`` otherwise."""
    if not path.is_dir():
        raise UserError(f"{what} {path} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


def claim_folder(folder: Path, config: Any, may_change: tuple[str, ...] = ()) -> None:
    """Make ``folder`` the output of ``config`` (a dataclass), and record how: configuration, versions, command.

    A rerun with the same configuration continues in the folder. Fields named in ``may_change`` may differ; the
    recorded configuration is then the newest.

    Raises:
        UserError: the folder belongs to another configuration, or to something else altogether.
    """
    check_folder(folder, config, may_change)
    try:
        write_text(folder / CONFIG_FILE, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        _record_start(folder)
    except OSError as error:
        raise UserError(f"can't write to {folder} ({error.strerror}): give another --output_dir") from None


def check_folder(folder: Path, config: Any, may_change: tuple[str, ...] = ()) -> None:
    """Refuse what :func:`claim_folder` would refuse, and write nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give another --output_dir")
    resolved = plain(config)
    recorded_file = folder / CONFIG_FILE
    if recorded_file.exists():
        recorded = _read_config(recorded_file)
        if len(recorded.keys() & resolved.keys()) < len(resolved) / 2:
            raise UserError(f"{folder} is the output of another command: give another --output_dir")
        differences = [name for name in _differences(recorded, resolved) if name.split(".")[0] not in may_change]
        if differences:
            described = "; ".join(_describe(recorded, resolved, differences))
            raise UserError(
                f"{folder} was made with another configuration ({described}):"
                " use the same one to continue, or another --output_dir"
            )
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not ours (it has no {CONFIG_FILE}): give another --output_dir")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        recorded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"{file} is damaged: give another --output_dir, or put the file right")
    return recorded


@contextlib.contextmanager
def only_writer(
    folder: Path, wait_seconds: float = 0.0, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Be the only one who writes to ``folder``; the system gives the lock up when the process ends.

    What a process that was killed left half-written there is removed.

    Args:
        folder: there already.
        wait_seconds: how long to wait for another to leave.
        while_waiting: called twice a second meanwhile; what it raises ends the waiting.

    Raises:
        UserError: another process is at work there.
    """
    lock = folder / ".lock"
    deadline, told = time.monotonic() + wait_seconds, False
    while True:
        try:
            with file_lock(lock, blocking=False):
                lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
                _clear_leftovers(folder)
                yield
                return
        except BlockingIOError:
            other = lock.read_text(encoding="utf-8") or "another process"
        if time.monotonic() >= deadline:
            waited = f" still after {wait_seconds:.0f} s" if wait_seconds else ""
            raise UserError(f"{other} is{waited} at work in {folder}: wait for its end, or stop it")
        if not told:
            print(f"{other} is at work in {folder}: waiting up to {wait_seconds:.0f} s for it to leave", flush=True)
            told = True
        while_waiting()
        time.sleep(_LOCK_LOOK_SECONDS)


def writer_of(folder: Path) -> str | None:
    """Who holds a folder by :func:`only_writer`, in words that end with `` on HOST``; None where nobody does."""
    lock = folder / ".lock"
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return lock.read_text(encoding="utf-8") or "another process"


def _clear_leftovers(folder: Path) -> None:
    for path in folder.rglob(".*"):
        if leftover := _LEFTOVER.fullmatch(path.name):
            replaced = path.with_name(leftover["name"])
            if leftover["kind"] == "old" and not replaced.exists():
                os.rename(path, replaced)
            else:
                _remove(path)


@contextlib.contextmanager
def file_lock(path: Path, blocking: bool = True) -> Iterator[None]:
    """Hold an exclusive lock, which the system gives up when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it, and ``blocking`` is False.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        yield


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as it will be read again from a file: tuples become lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _record_start(folder: Path) -> None:
    """Add this process to the folder's record of who worked on it; the first entry made it, the others continued."""
    file = folder / PROVENANCE_FILE
    starts = read_json(file, "delete it to start the record anew") if file.exists() else []
    write_json(file, [*starts, provenance()])


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two nested dictionaries, or lists of equal length, differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    names = []
    for key in dict.fromkeys([*old, *new]):
        names += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return names


def _describe(old: dict, new: dict, names: list[str]) -> list[str]:
    def value(config: Any, name: str) -> Any:
        for key in name.split("."):
            if isinstance(config, list):
                config = config[int(key)]
            else:
                config = config.get(key) if isinstance(config, dict) else None
        return config

    return [
        f"{name}: {textwrap.shorten(str(value(old, name)), _SHOWN_CHARACTERS, placeholder='...')} there,"
        f" {textwrap.shorten(str(value(new, name)), _SHOWN_CHARACTERS, placeholder='...')} now"
        for name in names[:3]
    ]


def provenance() -> dict[str, Any]:
    """How, where and with what this process runs."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _RECORDED_PACKAGES},
        "machine": {"system": platform.platform(), "processor": processor_name(), "cpus": os.cpu_count()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processor_name() -> str:
    """The processor's name as the system tells it, else its architecture's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
