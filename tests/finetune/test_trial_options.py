"""What a single run may ask of a trial: schedules, an early end, evaluations, checkpoints and curves on the way."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from finetune.batches import DeviceSplit
from finetune.model import Encoder
from finetune.tasks import TASKS
from finetune.trial import Cell, Protocol, Training, run_trial
from finetune.trial_files import TrialFiles

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROTOCOL = Protocol(max_seq_length=32, weight_decay=0.1, warmup_proportion=0.06)
CELL = Cell("sst2", 3e-3, 8, 3, "pretrained", 1)
STEPS_PER_EPOCH = 6  # 48 rows
Tasks = Mapping[str, Mapping[str, DeviceSplit]]


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Encoder:
    return Encoder(model_folder)


def run(
    encoder: Encoder, tasks: Tasks, files: TrialFiles | None = None, cell: Cell = CELL, **protocol: Any
) -> tuple[dict[str, Any], PreTrainedModel]:
    return run_trial(TASKS["sst2"], cell, replace(PROTOCOL, **protocol), encoder, tasks["sst2"], CPU, files)


def without_times(result: Mapping[str, Any]) -> list[Any]:
    epochs = [{name: epoch[name] for name in epoch if "seconds" not in name} for epoch in result["epochs"]]
    return [epochs, result["evaluations"], result["score"], result["score_epoch_index"]]


class Interrupted(Exception):
    pass


class EndsAfterSaving(TrialFiles):
    """As if killed right after so many checkpoints."""

    def __init__(self, folder: Path, save_steps: int, saves: int) -> None:
        super().__init__(folder, save_steps, None)
        self._left = saves

    def save(self, state: Mapping[str, Any]) -> None:
        super().save(state)
        self._left -= 1
        if not self._left:
            raise Interrupted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("score_epoch", ["last", "best"])
def test_an_interrupted_trial_goes_on_as_if_nothing_had_happened(
    precision: str, score_epoch: str, encoder: Encoder, tasks: Tasks, tmp_path: Path
) -> None:
    cell = replace(CELL, precision=precision)
    options = {"cell": cell, "score_epoch": score_epoch, "eval_steps": 4, "gradient_accumulation_steps": 2}
    expected, undisturbed = run(encoder, tasks, **options)
    for saves in (1, 2, 1, 1):  # within an epoch, at its end, after an evaluation
        with pytest.raises(Interrupted):
            run(encoder, tasks, EndsAfterSaving(tmp_path, 2, saves), **options)
    torch.manual_seed(99)
    files = TrialFiles(tmp_path, 2, None)
    result, classifier = run(encoder, tasks, files, **options)
    assert without_times(result) == without_times(expected)
    assert len(result["evaluations"]) == 3, "after 4, 8 and 16 of 18 steps; after 12 the epoch ends"
    weights = classifier.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in undisturbed.state_dict().items())
    files.end()
    assert not any(tmp_path.iterdir())


def test_evaluations_between_epochs_change_nothing_and_tell_where_they_were(encoder: Encoder, tasks: Tasks) -> None:
    plain, evaluated = run(encoder, tasks)[0], run(encoder, tasks, eval_steps=3)[0]
    assert [(point["step"], point["epoch"]) for point in evaluated["evaluations"]] == [(3, 0.5), (9, 1.5), (15, 2.5)]
    assert without_times(plain)[0] == without_times(evaluated)[0]
    halves = evaluated["evaluations"][0]["train_loss"]
    assert halves != evaluated["epochs"][0]["train_loss"]


def test_max_steps_ends_training_and_the_learning_rate_falls_to_0_there(encoder: Encoder, tasks: Tasks) -> None:
    result, _ = run(encoder, tasks, max_steps=8)
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2]
    training = training_of(encoder, tasks, max_steps=8)
    assert training.num_steps == 8
    assert rates(training, tasks)[-1] == 0.0


def training_of(encoder: Encoder, tasks: Tasks, cell: Cell = CELL, **protocol: Any) -> Training:
    torch.manual_seed(1)
    classifier = encoder.new_classifier(TASKS["sst2"], "pretrained", CPU)
    return Training(classifier, cell, replace(PROTOCOL, **protocol), tasks["sst2"]["train"], CPU)


def rates(training: Training, tasks: Tasks) -> list[float]:
    """Of each step, and after the last."""
    batch = next(tasks["sst2"]["train"].training_batches(8, seed=[0]))
    seen = [training.learning_rate]
    for _ in range(training.num_steps):
        training.step(batch)
        seen.append(training.learning_rate)
    return seen


def test_schedules_are_transformers_own(encoder: Encoder, tasks: Tasks) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    cosine = get_cosine_schedule_with_warmup(optimizer, 5, 18)
    expected = []
    for _ in range(19):
        expected.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    assert rates(training_of(encoder, tasks, lr_schedule="cosine", warmup_steps=5), tasks) == pytest.approx(expected)
    constant = rates(training_of(encoder, tasks, lr_schedule="constant", warmup_steps=3), tasks)
    assert constant == pytest.approx([0.0, 1e-3, 2e-3, *[3e-3] * 16])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(encoder: Encoder, tasks: Tasks) -> None:
    batch = next(tasks["sst2"]["train"].training_batches(7, seed=[0]))
    losses, weights = [], []
    for parts in (1, 3, 7, 20):
        training = training_of(encoder, tasks, gradient_accumulation_steps=parts, max_gradient_norm=0.0, max_steps=1)
        training._classifier.eval()  # dropout would differ
        losses.append(training.step(batch).item())
        weights.append(torch.nn.utils.parameters_to_vector(training._classifier.parameters()))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert all(torch.allclose(other, weights[0], atol=2e-6) for other in weights)


def test_gradients_are_clipped_to_the_norm_that_is_given(encoder: Encoder, tasks: Tasks) -> None:
    batch = next(tasks["sst2"]["train"].training_batches(8, seed=[0]))

    def norm_at_the_optimizer(max_gradient_norm: float) -> float:
        training = training_of(encoder, tasks, max_gradient_norm=max_gradient_norm)
        gradients = []

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients.extend(parameter.grad.norm() for group in optimizer.param_groups for parameter in group["params"])

        training.optimizer.register_step_pre_hook(look)
        training.step(batch)
        return torch.stack(gradients).norm().item()

    assert norm_at_the_optimizer(0.01) == pytest.approx(0.01, rel=1e-3)
    assert norm_at_the_optimizer(0.0) > 0.1, "0 leaves gradients as they are"


def test_tensorboard_shows_losses_and_metrics_under_the_trainers_names(
    encoder: Encoder, tasks: Tasks, tmp_path: Path
) -> None:
    result, _ = run(encoder, tasks, TrialFiles(tmp_path, None, 2))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/accuracy"} <= set(events.Tags()["scalars"])
    evaluated = events.Scalars("eval/loss")
    assert [point.step for point in evaluated] == [6, 12, 18]
    assert [point.value for point in evaluated] == pytest.approx([epoch["eval_loss"] for epoch in result["epochs"]])
    losses = events.Scalars("train/loss")
    assert [point.step for point in losses] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    first_epoch = sum(point.value for point in losses[:3]) / 3  # each of two full batches
    assert first_epoch == pytest.approx(result["epochs"][0]["train_loss"], rel=1e-5)
    assert not (tmp_path / "checkpoint.pt").exists()
