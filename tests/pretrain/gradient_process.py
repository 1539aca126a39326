"""One process of several: makes a training step through the engine and writes the gradients that the optimizer got.

torchrun --nproc_per_node N tests/pretrain/gradient_process.py DATA_DIR SLOTS OUTPUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_prep.shards import read_manifest
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches
from pretrain.ds_config import load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.model import MaskedLanguageModel
from pretrain.processes import leave, start_processes


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its first step."""

    gradients: list[torch.Tensor]

    def step(self, closure=None) -> None:
        self.gradients = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


def main(data_dir: str, slots: str, output: str) -> None:
    manifest = read_manifest(Path(data_dir))
    processes = start_processes()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(preset="bert-tiny", hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLanguageModel(resolve(config, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id))
    plan = BatchPlan(train_batch_size=24, micro_batch_size=4, world_size=processes.world_size)
    shape = replace(shape_of_micro_batches(manifest, plan), slots=int(slots))
    recorder = Recorder([{"params": list(model.parameters()), "peak_learning_rate": 0.1}], lr=0.1)
    engine = PretrainEngine(model, recorder, load_ds_config("auto"), plan, 0.0, processes)
    batches = TrainingBatches(manifest, plan, shape, processes.rank, processes.device, 42, 0)
    batch = batches.next_batch()
    result = engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, 0)
    counts = processes.sum(*(len(batch.micro_batches) * (rank == processes.rank) for rank in range(plan.world_size)))
    (loss_sum,) = processes.sum(result.loss_sum.item())
    if processes.rank == 0:
        names = [name for name, _ in model.named_parameters()]
        gradients = dict(zip(names, recorder.gradients, strict=True))
        facts = {"micro_batches": torch.tensor(counts), "loss": torch.tensor(loss_sum / batch.workload.predictions)}
        save_file(gradients | facts, output)
    batches.close()
    processes.barrier()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
