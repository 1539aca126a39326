"""A pretraining run: everything checked first, then one :class:`Pretrainer` in each process."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, only_writer
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.architecture import Architecture, resolve
from pretrain.batch_plan import check_divisible
from pretrain.checkpoint import Setting, TrainState, check_resumable, find_checkpoint, latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.ds_config import autocast_dtype, has_half_precision_weights, load_ds_config, zero_stage
from pretrain.engine import start_processes, stop_processes
from pretrain.init_from import resolve_from
from pretrain.kernels import check_kernels
from pretrain.optimizer import check_optimizer
from pretrain.pretrainer import MODEL_FOLDER, SUMMARY_FILE, Pretrainer

_MAY_CHANGE_ON_RESUME = ("resume", "kernels", "ds_config", "micro_batch_size", "log_interval", "checkpoints_kept")


def pretrain(config: PretrainConfig, data_dir: Path, output_dir: Path) -> None:
    """Run, or resume, one pretraining run in ``output_dir``; every process of the run calls it.

    Raises:
        UserError: data, configuration, hardware or output folder don't fit.
    """
    manifest = read_manifest(data_dir)
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()
    ds_config = load_ds_config(config.ds_config)
    check_optimizer(config.optimizer, zero_stage(ds_config), has_half_precision_weights(ds_config))
    check_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    if (output_dir / SUMMARY_FILE).exists():
        print(f"{output_dir} is complete: the model is in {output_dir / MODEL_FOLDER}")
        return
    checkpoint = _find_checkpoint(config, output_dir)
    state = read_state(checkpoint) if checkpoint else None
    architecture = _architecture(config, manifest, state)
    processes = start_processes()
    try:
        setting = Setting(
            manifest.sha256, asdict(architecture), config.optimizer.name, zero_stage(ds_config), processes.world_size
        )
        # What doesn't fit is refused before anything is written.
        check_kernels(config.kernels, processes.device, autocast_dtype(ds_config))
        if checkpoint and state:
            check_resumable(checkpoint, state.setting, setting)
        check_divisible(config.train_batch_size, config.micro_batch_size, processes.world_size)
        with _claimed(output_dir, config, processes.rank):
            run = Pretrainer(config, architecture, ds_config, manifest, output_dir, setting, state, processes)
            run.prepare(checkpoint)
            run.train()
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason} Take a smaller model, micro_batch_size or max_seq_length") from None
    finally:
        stop_processes()


@contextlib.contextmanager
def _claimed(output_dir: Path, config: PretrainConfig, rank: int) -> Iterator[None]:
    """Rank 0 writes, and alone."""
    if rank:
        yield
        return
    with errors_of_writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(output_dir):
        claim_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
        yield


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


def _find_checkpoint(config: PretrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None for a fresh start."""
    own = latest_checkpoint(output_dir)
    if own and config.resume == "never":
        raise UserError(f"{output_dir} has checkpoints and resume is 'never': give another --output_dir")
    return own or (None if config.resume in ("auto", "never") else find_checkpoint(Path(config.resume)))
