"""A pretraining run: everything checked first, then one :class:`Pretrainer` in each process."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, only_writer, write_json
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.architecture import Architecture, resolve
from pretrain.batch_plan import check_divisible
from pretrain.budget import parse_duration
from pretrain.checkpoint import Setting, TrainState, check_resumable, find_checkpoint, latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.ds_config import autocast_dtype, has_half_precision_weights, load_ds_config, zero_stage
from pretrain.init_from import resolve_from
from pretrain.interruptions import Interruptions
from pretrain.kernels import check_kernels
from pretrain.optimizer import check_optimizer
from pretrain.pretrainer import Pretrainer
from pretrain.processes import Processes, start_processes, stop_processes
from pretrain.summary import DS_CONFIG_FILE, GOES_ON, MODEL_FOLDER, SUMMARY_FILE, is_complete, read_summary
from pretrain.watch import Watch

_MAY_CHANGE_ON_RESUME = (
    "resume",
    "pause_at",
    "kernels",
    "ds_config",
    "micro_batch_size",
    "log_interval",
    "checkpoints_kept",
    "preemption_margin",
    "hang_timeout",
)
_WAIT_FOR_THE_FOLDER_SECONDS = 120.0  # a run that has been told to leave makes its step, saves and ends
_THE_WATCH_SPEAKS_FIRST_SECONDS = 60.0  # before torch's own timeouts, which name nobody


class StoppedError(UserError):
    """The run was asked to leave before it began."""

    exit_code = GOES_ON


def pretrain(config: PretrainConfig, data_dir: Path, output_dir: Path, wandb: bool = False) -> str:
    """Run, or resume, one pretraining run in ``output_dir``; every process of the run calls it.

    Returns:
        why it has ended, one of the values of ``stopped_by`` in ``summary.json``.

    Raises:
        UserError: data, configuration, hardware or output folder don't fit, or another process of the run is lost.
    """
    manifest = read_manifest(data_dir)
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()
    ds_config = load_ds_config(config.ds_config)
    check_optimizer(config.optimizer, zero_stage(ds_config), has_half_precision_weights(ds_config))
    check_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    patience = parse_duration(config.hang_timeout)
    processes = start_processes(timedelta(seconds=patience + _THE_WATCH_SPEAKS_FIRST_SECONDS))
    watch = Watch(processes, output_dir, patience)
    interruptions = Interruptions(parse_duration(config.preemption_margin))
    try:
        with watch.kept(), interruptions.noted():
            stopped_by = _run(config, ds_config, manifest, output_dir, processes, watch, interruptions, wandb)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason} Take a smaller model, micro_batch_size or max_seq_length") from None
    stop_processes()
    return stopped_by


def _run(
    config: PretrainConfig,
    ds_config: dict[str, Any],
    manifest: Manifest,
    output_dir: Path,
    processes: Processes,
    watch: Watch,
    interruptions: Interruptions,
    wandb: bool,
) -> str:
    check_kernels(config.kernels, processes.device, autocast_dtype(ds_config))
    check_divisible(config.train_batch_size, config.micro_batch_size, processes.world_size)
    if not output_dir.exists():  # what doesn't fit is refused before anything is written
        _starting_point(_find_checkpoint(config, output_dir), config, ds_config, manifest, processes)
    if stopped_by := _completed(output_dir, processes):
        return stopped_by
    with _only_run(output_dir, processes.rank, lambda: _keep_waiting(output_dir, watch, interruptions)):
        if stopped_by := _completed(output_dir, processes):  # by the one that this one has waited for
            return stopped_by
        checkpoint = _agree_on_checkpoint(config, output_dir, processes)
        setting, state = _starting_point(checkpoint, config, ds_config, manifest, processes)
        if processes.rank == 0:
            _claim(output_dir, config, ds_config)
        watch.enter("starting", state.step if state else 0)
        run = Pretrainer(
            config, ds_config, manifest, output_dir, setting, state, checkpoint, processes, watch, interruptions, wandb
        )
        run.prepare()
        return run.train()


def _completed(output_dir: Path, processes: Processes) -> str | None:
    """How the run in ``output_dir`` has ended if nothing is left to do; rank 0 looks, all get its answer."""
    is_over = processes.rank == 0 and is_complete(output_dir)
    stopped_by = processes.share(read_summary(output_dir)["stopped_by"] if is_over else "")
    if is_over:
        print(f"{output_dir} is complete: the model is in {output_dir / MODEL_FOLDER}")
    return stopped_by or None


@contextlib.contextmanager
def _only_run(output_dir: Path, rank: int, keep_waiting: Callable[[], None]) -> Iterator[None]:
    """Rank 0 writes, and alone: a run that has been told to leave is waited for."""
    if rank:
        yield
        return
    with errors_of_writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(output_dir, _WAIT_FOR_THE_FOLDER_SECONDS, keep_waiting):
        yield


def _keep_waiting(output_dir: Path, watch: Watch, interruptions: Interruptions) -> None:
    watch.enter("starting", 0, "waiting for the folder")
    if reason := interruptions.pending():
        raise StoppedError(f"stopped by {reason} while waiting for {output_dir}: the same command begins anew")


def _claim(output_dir: Path, config: PretrainConfig, ds_config: dict[str, Any]) -> None:
    claim_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    with errors_of_writing(output_dir):
        write_json(output_dir / DS_CONFIG_FILE, ds_config)
        (output_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of an end that was none


def _agree_on_checkpoint(config: PretrainConfig, output_dir: Path, processes: Processes) -> Path | None:
    """Rank 0's answer, taken while nobody else writes; other machines may see a shared folder late."""
    name = processes.share(str(_find_checkpoint(config, output_dir) or "") if processes.rank == 0 else "")
    return Path(name) if name else None


def _find_checkpoint(config: PretrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None for a fresh start."""
    own = latest_checkpoint(output_dir)
    if own and config.resume == "never":
        raise UserError(f"{output_dir} has checkpoints and resume is 'never': give another --output_dir")
    return own or (None if config.resume in ("auto", "never") else find_checkpoint(Path(config.resume)))


def _starting_point(
    checkpoint: Path | None,
    config: PretrainConfig,
    ds_config: dict[str, Any],
    manifest: Manifest,
    processes: Processes,
) -> tuple[Setting, TrainState | None]:
    """What the run is set to, and where it stands; refused if the checkpoint does not fit."""
    state = read_state(checkpoint) if checkpoint else None
    architecture = _architecture(config, manifest, state)
    setting = Setting(
        manifest.sha256, asdict(architecture), config.optimizer.name, zero_stage(ds_config), processes.world_size
    )
    if checkpoint and state:
        check_resumable(checkpoint, state.setting, setting)
    return setting, state


def _architecture(config: PretrainConfig, manifest: Manifest, state: TrainState | None) -> Architecture:
    """What is configured, or that of the model to start from; a run that goes on does without that model."""
    if config.init_from:
        if state:
            return Architecture(**state.setting.architecture)
        return resolve_from(config.init_from, manifest, config.model)
    try:
        return resolve(config.model, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
