"""Which attention heads a tuned classifier can do without, by the data, and how fast it is without them.

The importance of a head is that of Michel, Levy and Neubig 2019 ("Are Sixteen Heads Really Better than One?", NeurIPS,
section 4.1): the mean over training rows of ``|dL/dg|``, where ``g`` is a gate of 1 on the head's output. It is
normalised within each layer (by the l2 norm, as there), and heads go in the order of it. How many go is not chosen by
hand: as many as held-out training rows allow.
"""

import copy
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.batches import DeviceSplit
from finetune.heads import Heads, attentions, kept_heads, remove_heads, removed_heads
from finetune.inference import Precision, decide, logits_of, predict
from finetune.losses import finite, loss_of
from finetune.metrics import compute
from finetune.model import Initialization
from finetune.tasks import Task
from finetune.tokens import TokenizedSplit, select_rows

TIMED_ROWS: Final = 64
POINTS: Final = 100  # of a metric that is a fraction
_ROUNDING: Final = 1e-9  # a cost of exactly the tolerance is no more than it
_GRADIENT_BATCH_SIZE: Final = 16
_TIMED_BATCHES: Final = {1: 16, 32: 2}  # batch size -> how many
_PASSES: Final = 5

Head = tuple[int, int]
"""Layer, and the head's number in the unpruned model."""


@dataclass(frozen=True)
class Choice:
    """The heads that one round removes, and what it found out to choose them."""

    heads: dict[int, list[int]]
    """By layer; {} where none can go."""
    importance: dict[int, dict[int, float]]
    """Of every head that is there: layer -> head -> importance, normalised."""
    held_out_scores: dict[int, float]
    """Number of heads removed -> score on the held-out rows, a fraction; 0 is the model as it was."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Choice":
        """From JSON, whose keys are texts."""
        return cls(
            heads={int(layer): heads for layer, heads in record["heads"].items()},
            importance={
                int(layer): {int(head): value for head, value in values.items()}
                for layer, values in record["importance"].items()
            },
            held_out_scores={int(number): score for number, score in record["held_out_scores"].items()},
        )


class PrunedStart:
    """What trials start from: a classifier as it is, its head included.

    Args:
        classifier: in float32; trials train copies of it.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        self._classifier = classifier

    def new_classifier(self, task: Task, initialization: Initialization, device: torch.device) -> PreTrainedModel:
        """A copy of it on ``device``."""
        return copy.deepcopy(self._classifier).to(device)


def hold_out(split: TokenizedSplit, share: float, seed: int) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Part a training split: what is trained on, and the share that is held out, which ``seed`` draws."""
    order = np.random.default_rng(seed).permutation(len(split))
    num_held_out = round(share * len(split))
    return select_rows(split, np.sort(order[num_held_out:])), select_rows(split, np.sort(order[:num_held_out]))


def choose_heads(
    classifier: PreTrainedModel,
    task: Task,
    training: DeviceSplit,
    held_out: DeviceSplit,
    tolerance: float,
    precision: Precision = "fp32",
) -> Choice:
    """The least important heads of a classifier, as many as cost no more than ``tolerance`` on the held-out rows.

    The number is found by bisection: removing one head more, in the order of importance, costs too much. Every layer
    keeps its most important head.

    Args:
        classifier: a tuned one, which may lack heads already; it is left as it is.
        task: its task.
        training: the rows that importance is taken over.
        held_out: other rows, which decide the number.
        tolerance: points of the task's metric (the metric times 100).
        precision: of the matrix products.
    """
    importance = head_importance(classifier, training, precision)
    order = removal_order(importance)
    scores = {0: score_of(classifier, task, held_out, precision)}

    def is_cheap(num_heads: int) -> bool:
        smaller = copy.deepcopy(classifier)
        remove_heads(smaller, by_layer(order[:num_heads]))
        scores[num_heads] = score_of(smaller, task, held_out, precision)
        return POINTS * (scores[0] - scores[num_heads]) <= tolerance + _ROUNDING

    num_heads = largest(len(order), is_cheap)
    return Choice(by_layer(order[:num_heads]), importance, dict(sorted(scores.items())))


def largest(most: int, is_possible: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that is possible, by bisection: 0 always is, and what is above it is not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if is_possible(middle):
            low = middle
        else:
            high = middle - 1
    return low


def head_importance(
    classifier: PreTrainedModel, data: DeviceSplit, precision: Precision = "fp32"
) -> dict[int, dict[int, float]]:
    """The importance of every head that is there: layer -> head -> a number in [0, 1], of l2 norm 1 over the layer.

    Args:
        classifier: without dropout meanwhile.
        data: rows with labels, all of which count alike.
        precision: of the matrix products.

    Raises:
        TrialFailure: a gradient is not a finite number.
    """
    classifier.eval()
    totals: dict[int, torch.Tensor] = {}
    with _gates(classifier) as gates:
        for batch in data.evaluation_batches(_GRADIENT_BATCH_SIZE):
            logits = logits_of(classifier, batch, precision)
            # Summed over the rows, so that a row's gate has the gradient of this row's loss alone.
            gradients = torch.autograd.grad(loss_of(logits, batch.labels) * len(batch.rows), list(gates.values()))
            for layer, gradient in zip(gates, gradients, strict=True):
                totals[layer] = totals.get(layer, 0) + gradient.abs().double().sum(dim=0)
    importance = {}
    for layer, heads in kept_heads(classifier).items():
        finite(totals[layer].sum().item(), "pruned model's")
        norm = totals[layer].norm().clamp(min=torch.finfo(torch.float64).tiny)
        importance[layer] = dict(zip(heads, (totals[layer] / norm).tolist(), strict=True))
    return importance


@contextmanager
def _gates(classifier: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Multiply every head's output by a gate of 1; yields the last forward pass's gates, layer -> [rows, heads]."""
    gates: dict[int, torch.Tensor] = {}

    def gate(layer: int, num_heads: int, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        outputs = inputs[0].unflatten(-1, (num_heads, -1))  # [rows, tokens, heads, head size]
        gates[layer] = torch.ones(len(outputs), num_heads, device=outputs.device, requires_grad=True)
        return (outputs * gates[layer][:, None, :, None]).flatten(-2)

    def hook(layer: int, num_heads: int) -> Callable[[nn.Module, tuple[torch.Tensor]], torch.Tensor]:
        return lambda module, inputs: gate(layer, num_heads, inputs)

    handles = [
        attention.output.dense.register_forward_pre_hook(hook(layer, attention.self.num_attention_heads))
        for layer, attention in enumerate(attentions(classifier))
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def removal_order(importance: Mapping[int, Mapping[int, float]]) -> list[Head]:
    """The heads from the least important on, but for the most important one of each layer, which stays."""
    ranked = {
        (layer, head): value
        for layer, values in importance.items()
        for head, value in sorted(values.items(), key=lambda item: item[1])[:-1]
    }
    return sorted(ranked, key=ranked.get)


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads as :func:`finetune.heads.remove_heads` takes them."""
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(heads):
        layers[layer].append(head)
    return dict(layers)


def metrics_of(
    classifier: PreTrainedModel, task: Task, data: DeviceSplit, precision: Precision = "fp32"
) -> dict[str, float]:
    """The task's metrics on a split."""
    logits, labels = predict(classifier, data, precision)
    return compute(task.metrics, decide(task, logits), labels.numpy())


def score_of(classifier: PreTrainedModel, task: Task, data: DeviceSplit, precision: Precision = "fp32") -> float:
    """The metric that counts, a fraction."""
    return metrics_of(classifier, task, data, precision)[task.selected_by]


def measure_speed(
    classifier: PreTrainedModel, removed: Sequence[Heads], data: DeviceSplit, precision: Precision = "fp32"
) -> list[dict[int, float]]:
    """Rows a second at batch 1 and 32 of a model without these heads; only shapes matter to it.

    Every shape is measured in turn, several times, so that a machine's slow minute hits all alike; the medians count.

    Args:
        classifier: the one with most heads; it may lack some.
        removed: all heads that each of the models lacks, those that ``classifier`` lacks included.
        data: :data:`TIMED_ROWS` rows of about one length.
        precision: of the matrix products.
    """
    shapes = list({str(heads): heads for heads in removed}.values())
    speeds: dict[str, list[dict[int, float]]] = defaultdict(list)
    for _, heads in itertools.product(range(_PASSES), shapes):
        smaller, gone = copy.deepcopy(classifier), removed_heads(classifier)
        remove_heads(smaller, {layer: sorted({*there} - {*gone.get(layer, ())}) for layer, there in heads.items()})
        speeds[str(heads)].append({size: rows_per_second(smaller, data, size, precision) for size in _TIMED_BATCHES})
    return [
        {size: statistics.median(measured[size] for measured in speeds[str(heads)]) for size in _TIMED_BATCHES}
        for heads in removed
    ]


@torch.inference_mode()
def rows_per_second(
    classifier: PreTrainedModel, data: DeviceSplit, batch_size: int, precision: Precision = "fp32"
) -> float:
    """How many rows a second the classifier takes, after a batch to warm up.

    Args:
        classifier: on the rows' device.
        data: what it takes: two batches of 32 rows, or 16 of 1.
        batch_size: 1 or 32.
        precision: of the matrix products.
    """
    classifier.eval()
    batches = list(itertools.islice(data.evaluation_batches(batch_size), _TIMED_BATCHES[batch_size]))
    logits_of(classifier, batches[0], precision)
    started = _now(classifier.device)
    for batch in batches:
        logits_of(classifier, batch, precision)
    return sum(len(batch.rows) for batch in batches) / (_now(classifier.device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
