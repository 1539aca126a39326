"""A search from start to report: everything checked first, then a coordinator on each machine, then the report."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, file_lock, only_writer, provenance
from common.page import HTML_FILE
from common.storage import errors_of_storage, sqlite_file
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.architecture import Architecture, resolve
from pretrain.budget import parse_duration
from pretrain.config import PretrainConfig
from pretrain.coordinator import Coordinator
from pretrain.ds_config import autocast_dtype, has_half_precision_weights, load_ds_config, zero_stage
from pretrain.fingerprint import search_fingerprint
from pretrain.init_from import resolve_from
from pretrain.interruptions import Interruptions
from pretrain.kernels import check_kernels
from pretrain.optimizer import check_optimizer
from pretrain.places import Place, find_places, hardware_of
from pretrain.sampling import propose
from pretrain.search_config import SearchConfig, describe
from pretrain.search_progress import look
from pretrain.search_record import is_there, render, storage_url
from pretrain.search_results import BEST_FILE
from pretrain.study import SearchStore
from pretrain.summary import GOES_ON

_RUNS_FOLDER: Final = "runs"
_MACHINES_FOLDER: Final = ".machines"  # hidden: a folder with nothing else in it yet is not taken for another's
_MAY_CHANGE: Final = ("num_runs", "keep_dropped_checkpoints")
_SECONDS_BETWEEN_LINES: Final = 60.0
_SECONDS_BETWEEN_UPDATES: Final = 3.0  # of the line on a terminal


def run_search(config: SearchConfig, data_dir: Path, output_dir: Path) -> int:
    """Run every configuration that has not come to its end, and write the report.

    Args:
        config: the search.
        data_dir: of all runs.
        output_dir: where runs and report go; a rerun with the same configuration continues there.

    Returns:
        the exit code: 0 for a search that is over, :data:`pretrain.summary.GOES_ON` for one that was asked to leave.

    Raises:
        UserError: bad input, before any work; a storage or folder that can't be written to; or runs have failed.
    """
    manifest = read_manifest(data_dir)
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()
    places = _places(config)
    given, config = config, _on(config, places[0])
    num_parameters = _check_runs(config, manifest, places[0])
    check_folder(output_dir, given, _MAY_CHANGE)
    url, fingerprint = storage_url(config, output_dir), search_fingerprint(config, manifest, hardware_of(places[0]))
    facts = _facts(manifest, places, num_parameters)
    with errors_of_storage(url):
        if config.storage or is_there(url):
            SearchStore(url, config).check(fingerprint)
        with _only_coordinator(config, output_dir, url):
            claim_folder(output_dir, given, _MAY_CHANGE)
            store = SearchStore(url, config)
            _refuse_lost_storage(store, output_dir)
            store.open(fingerprint, facts)
            store.add_missing(nobody_runs=not store.serves_machines)
            left_because = _coordinate(config, store, data_dir, output_dir, places)
            progress = render(config, store, output_dir)
    print(progress.line())
    print(f"report: {output_dir / HTML_FILE}")
    print(f"the best configuration: {output_dir / BEST_FILE}" if progress.best else "no run has finished")
    if left_because:
        print(f"stopped by {left_because}: all saved, the same command goes on")
        return GOES_ON
    if failed := [run for run in store.runs() if run.state == "failed"]:
        first = f"run {failed[0].name} with: {failed[0].because}"
        raise UserError(f"{len(failed)} of the runs failed, {first}; mend that, and the same command tries again")
    return 0


def _places(config: SearchConfig) -> list[Place]:
    """Of this machine; the number of runs of a sampler may be raised later, and must not change what a run has."""
    needed = config.num_planned if config.sampler == "grid" else sys.maxsize
    return find_places(config.gpus_per_run, needed)


def _on(config: SearchConfig, place: Place) -> SearchConfig:
    """The search with as many processes a run as there are at a place of this machine."""
    try:
        return replace(config, gpus_per_run=place.num_processes)
    except ValueError as error:  # a batch that can't be divided among them
        raise UserError(str(error)) from None


def _coordinate(
    config: SearchConfig, store: SearchStore, data_dir: Path, output_dir: Path, places: Sequence[Place]
) -> str | None:
    show = _Teller(config, store)
    interruptions = Interruptions(parse_duration(config.pretrain.preemption_margin))
    runs_dir = output_dir.resolve() / _RUNS_FOLDER
    with interruptions.noted(), show.ended():
        return Coordinator(config, store, data_dir.resolve(), runs_dir, places, interruptions, show.tell).run()


class _Teller:
    """Tells now and then how far a search is."""

    def __init__(self, config: SearchConfig, store: SearchStore) -> None:
        self._config, self._store, self._next = config, store, 0.0

    def tell(self) -> None:
        """A line, if it is time for one."""
        if time.monotonic() < self._next:
            return
        line = look(self._config, self._store.facts(), self._store.runs(), time.time()).line()
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="", flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_UPDATES
        else:
            print(line, flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Leave a terminal's last line as it is, and what follows on lines of its own."""
        try:
            yield
        finally:
            if sys.stdout.isatty():
                print(flush=True)


# --- before anything is written ---


@contextlib.contextmanager
def _only_coordinator(config: SearchConfig, output_dir: Path, url: str) -> Iterator[None]:
    """Be the only one in the folder and on the storage; of this machine where several machines share them."""
    folder = output_dir if sqlite_file(url) else output_dir / _MACHINES_FOLDER / socket.gethostname()
    with contextlib.ExitStack() as stack:
        with errors_of_writing(output_dir):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(folder))
        if config.storage and (file := sqlite_file(url)):
            try:
                stack.enter_context(file_lock(Path(f"{file}.search"), blocking=False))
            except BlockingIOError:
                raise UserError(f"another search is at work on {url}: wait for its end, or stop it") from None
        yield


def _refuse_lost_storage(store: SearchStore, output_dir: Path) -> None:
    """Runs without a storage that knows of them: their budget can't be told, nor who has been dropped."""
    has_runs = any((output_dir / _RUNS_FOLDER).glob("*/*"))
    if has_runs and not (store.reopen() and store.runs()):
        raise UserError(
            f"{output_dir} has runs, and the storage knows of none: bring their storage back, or give another "
            "--output_dir"
        )


def _check_runs(config: SearchConfig, manifest: Manifest, place: Place) -> int:
    """Refuse what any run would be refused for; the number of parameters of the first one's model.

    Raises:
        UserError: naming the configuration.
    """
    device = torch.device("cuda" if place.gpus else "cpu")
    architectures: dict[Any, Architecture] = {}
    for parameters in config.grid() if config.sampler == "grid" else [propose(config, [])]:
        run = config.run_config(parameters)
        try:
            ds_config = load_ds_config(run.ds_config)
            check_kernels(run.kernels, device, autocast_dtype(ds_config))
            check_optimizer(run.optimizer, zero_stage(ds_config), has_half_precision_weights(ds_config))
            model = (run.init_from, run.model)
            architectures[model] = architectures.get(model) or _architecture(run, manifest)
        except (UserError, ValueError) as error:
            raise UserError(f"{describe(parameters)}: {error}") from None
    return next(iter(architectures.values())).num_parameters


def _architecture(config: PretrainConfig, manifest: Manifest) -> Architecture:
    if config.init_from:
        return resolve_from(config.init_from, manifest, config.model)
    return resolve(config.model, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)


def _facts(manifest: Manifest, places: Sequence[Place], num_parameters: int) -> dict[str, Any]:
    """What the report tells of all runs."""
    made = provenance()
    return {
        "data_dir": str(manifest.folder.resolve()),
        "manifest_sha256": manifest.sha256,
        "hardware": hardware_of(places[0]),
        "code": made["commit"],
        "versions": made["versions"],
        "gpus_per_run": places[0].num_processes,
        "places": len(places),
        "num_parameters": num_parameters,
    }
