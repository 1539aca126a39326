"""One process of several: validates, trains three steps with every optimizer and saves, goes on with what others saved.

torchrun --nproc_per_node N tests/pretrain/ranks_process.py DATA_DIR FOLDER [FROM ...]
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_prep.shards import Manifest, read_manifest
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches
from pretrain.checkpoint import Checkpoints, Setting, TrainState, latest_checkpoint, load_weights
from pretrain.ds_config import load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.processes import Processes, leave, start_processes
from pretrain.validation import Validation

OPTIMIZERS = ("adamw", "lamb", "adafactor", "muon")
CONFIG = ModelConfig(preset="bert-tiny", hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BATCH, MICRO_BATCH, STEPS_BEFORE, STEPS_AFTER = 24, 4, 3, 2


class Training:
    """A model on an engine, from its first step on."""

    def __init__(self, manifest: Manifest, optimizer: str, processes: Processes) -> None:
        torch.manual_seed(0)
        self.manifest, self.optimizer, self.processes = manifest, optimizer, processes
        architecture = resolve(CONFIG, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
        model = MaskedLanguageModel(architecture)
        self.plan = BatchPlan(BATCH, MICRO_BATCH, processes.world_size)
        self.setting = Setting(manifest.sha256, asdict(architecture), optimizer, 0, processes.world_size)
        chosen = build_optimizer(model, OptimizerConfig(name=optimizer, learning_rate=1e-3))
        self.engine = PretrainEngine(model, chosen, load_ds_config("auto"), self.plan, 1.0, processes)
        self.step = 0

    def train(self, steps: int) -> None:
        batches = TrainingBatches(
            self.manifest,
            self.plan,
            shape_of_micro_batches(self.manifest, self.plan),
            self.processes.rank,
            self.processes.device,
            42,
            self.step * BATCH,
        )
        for _ in range(steps):
            batch = batches.next_batch()
            self.engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, 0)
            self.step += 1
        batches.close()

    def save(self, folder: Path) -> None:
        state = TrainState(self.step, self.step * BATCH, 0, {}, MICRO_BATCH, {}, None, {}, None, self.setting)
        checkpoints = Checkpoints(folder, self.manifest.tokenizer_folder, 1, self.processes.rank)
        checkpoints.save(self.engine, self.step, lambda: state, {})

    def load(self, folder: Path) -> None:
        load_weights(self.engine, latest_checkpoint(folder))
        self.step = STEPS_BEFORE

    def write_weights(self, file: Path) -> None:
        if self.processes.rank == 0:
            save_file({name: tensor.detach() for name, tensor in self.engine.model.named_parameters()}, file)


def main(data_dir: str, folder: str, *sources: str) -> None:
    manifest, processes, root = read_manifest(Path(data_dir)), start_processes(), Path(folder)
    torch.set_num_threads(1)
    own = str(processes.world_size)
    for optimizer in OPTIMIZERS:
        training = Training(manifest, optimizer, processes)
        if optimizer == "adamw":
            figures = Validation(manifest, training.plan, training.engine).run(lambda: True)
            if processes.rank == 0:
                (root / f"validation-{own}.json").write_text(json.dumps(asdict(figures)))
        training.train(STEPS_BEFORE)
        training.save(root / own / optimizer)
        training.train(STEPS_AFTER)
        training.write_weights(root / f"{own}-{optimizer}.safetensors")
        for source in sources:
            resumed = Training(manifest, optimizer, processes)
            resumed.load(root / source / optimizer)
            resumed.train(STEPS_AFTER)
            resumed.write_weights(root / f"{source}-to-{own}-{optimizer}.safetensors")
    processes.barrier()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
