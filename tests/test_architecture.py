"""The import rules of docs/architecture.md, read from its list and from the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "data_prep", "pretrain", "finetune")
LIBRARY_OWNERS = {
    "deepspeed": {"pretrain/engine.py", "pretrain/muon.py", "pretrain/kernels_deepspeed.py"},
    "h5py": {"data_prep/shards.py"},
    "optuna": {"common/storage.py", "finetune/study.py", "pretrain/sampling.py", "pretrain/study.py"},
}
EXCEPTION = "data_prep.shards"  # a format has one owner
PRETRAINER_READS_SHARDS = "pretrain"


def documented_files() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(rf"^((?:{'|'.join(PACKAGES)})/\w+\.py) ", text, flags=re.MULTILINE)


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.update([node.module] + [f"{node.module}.{alias.name}" for alias in node.names])
    return modules


FILES = documented_files()


def test_the_document_lists_every_file() -> None:
    existing = [str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).glob("*.py")]
    assert sorted(FILES) == sorted(name for name in existing if not name.endswith("__init__.py"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_is_above_it(name: str) -> None:
    package = name.split("/")[0]
    above = [file for file in FILES[: FILES.index(name)] if file.startswith(f"{package}/")]
    allowed = {file.removesuffix(".py").replace("/", ".") for file in above}
    for module in imported_modules(ROOT / name):
        top = module.split(".")[0]
        if top == package:
            file = ".".join(module.split(".")[:2])
            assert file == package or file in allowed, f"{name} imports {module}, which is not above it"
        elif top in PACKAGES and top != "common":
            assert package == PRETRAINER_READS_SHARDS, f"{name} imports {module} of another package"
            assert module.startswith(EXCEPTION), f"{name} imports {module}: only {EXCEPTION} is shared"


@pytest.mark.parametrize("library", LIBRARY_OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    importers = {
        name for name in FILES if any(module.split(".")[0] == library for module in imported_modules(ROOT / name))
    }
    assert importers == LIBRARY_OWNERS[library]
