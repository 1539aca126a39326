"""The Dockerfile agrees with the project; building it takes Docker and a network, so no test does."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    if line and not line.startswith("#")
]
COPIED = [source for name, arguments in INSTRUCTIONS if name == "COPY" for source in shlex.split(arguments)[:-1]]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in INSTRUCTIONS if name == instruction]


def is_sent(source: str) -> bool:
    """Whether .dockerignore lets a file or folder through; its last matching line decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(source, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def test_what_it_copies_is_there_and_sent_to_the_build() -> None:
    assert COPIED
    assert [source for source in COPIED if not (ROOT / source).exists()] == []
    assert [source for source in COPIED if not is_sent(source)] == []


def test_it_copies_all_that_the_commands_import() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    commands = {path.name for path in ROOT.glob("run_*.py")}
    assert packages | commands | {"configs", "ds_configs"} <= set(COPIED)


def test_its_torch_is_the_pinned_one() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    (image,) = arguments_of("FROM")
    assert image.startswith(f"pytorch/pytorch:{pins['torch']}-cuda")


def test_its_packages_are_the_pinned_ones() -> None:
    (install,) = [command for command in arguments_of("RUN") if "pip install" in command]
    assert "--constraint constraints.txt" in install
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w.-]+", dependency)[0].lower() for dependency in dependencies}
    assert names <= pinned


def test_nothing_runs_as_root() -> None:
    assert arguments_of("USER")[-1] not in ("root", "0")
    names = [name for name, _ in INSTRUCTIONS]
    assert "RUN" not in names[names.index("USER") :]
