"""What all runs of a search have in common: data, model, budget, hardware and the code that trains.

Losses can only be compared where all of it is the same, so a search records it and refuses anything else.
"""

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from common.folders import leaves, plain, sha256_of_file
from common.hub import model_folder, weight_files
from data_prep.shards import Manifest
from pretrain.ds_config import load_ds_config
from pretrain.search_config import SearchConfig

ROOT: Final = Path(__file__).parent.parent
_PROGRAM: Final = ROOT / "run_pretraining.py"
_PACKAGES: Final = ("torch", "deepspeed", "transformers", "numpy")
_NO_MATTER: Final = ("log_interval", "checkpoints_kept", "preemption_margin", "hang_timeout", "export_at")
_SHOWN: Final = 12  # digits of a checksum: enough to tell two apart


def search_fingerprint(config: SearchConfig, manifest: Manifest, hardware: str) -> dict[str, Any]:
    """By name, what must be the same for all runs of a search.

    Args:
        config: of the search.
        manifest: of the data folder.
        hardware: that a run computes on, see :func:`pretrain.places.hardware_of`.
    """
    settings = leaves(plain(config.pretrain))
    rungs = [f"{rung.at}: {rung.keep}" for rung in config.rungs]
    return {
        "data": manifest.sha256[:_SHOWN],
        "hardware": hardware,
        **{name: value for name, value in settings.items() if name not in _NO_MATTER},
        **{f"content of ds_config {name}": load_ds_config(name) for name in _tried(config, "ds_config")},
        **{f"weights of {name}": _weights_checksum(name) for name in _tried(config, "init_from") if name},
        **{f"space of {name}": values for name, values in plain(config)["space"].items()},
        "rungs": rungs,
        "hyperband": config.hyperband and plain(config.hyperband),
        "sampler": config.sampler,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        **{f"code of {name}": checksum for name, checksum in code_checksums().items()},
    }


def _tried(config: SearchConfig, option: str) -> list[Any]:
    """The values of an option that runs may have."""
    return [getattr(config.pretrain, option), *config.space.get(option, [])]


def _weights_checksum(name: str) -> str:
    files = weight_files(model_folder(name, "init_from"))
    return " ".join(sha256_of_file(file)[:_SHOWN] for file in files)


def code_checksums() -> dict[str, str]:
    """The files that ``run_pretraining.py`` is made of, by name, with the beginning of their SHA-256."""
    found: dict[str, str] = {}
    to_read = [_PROGRAM]
    while to_read:
        file = to_read.pop()
        name = str(file.relative_to(ROOT))
        if name not in found:
            found[name] = sha256_of_file(file)[:_SHOWN]
            to_read += _imported_files(file)
    return dict(sorted(found.items()))


def _imported_files(file: Path) -> Iterator[Path]:
    """The project's own files that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = (ROOT / name.replace(".", "/")).with_suffix(".py")
            if path.is_file():
                yield path
