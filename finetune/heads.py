"""Attention heads taken out of an encoder for good, and the record of it beside the model.

A pruned folder's ``config.json`` is the full architecture's, and its weights are smaller than that, so that whoever
does not know of :data:`PRUNED_HEADS_FILE` fails on their shapes and computes nothing wrong. Heads keep their original
numbers however many rounds of removal there are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common.errors import UserError
from common.folders import read_json, write_json

PRUNED_HEADS_FILE: Final = "pruned_heads.json"

_PRUNABLE: Final = ("bert", "megatron-bert", "roberta", "xlm-roberta", "camembert", "electra")
_ATTRIBUTE: Final = "removals_of_heads"  # of a model: what was removed, in the order of the removals

Heads = Mapping[int, Sequence[int]]
"""Layer to heads of it, both counted from 0 and numbered as in the unpruned model."""


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer: ``self`` (query, key, value) and ``output`` (with the projection ``dense``).

    Raises:
        UserError: the model is of a family whose heads can't be removed.
    """
    kind = model.config.model_type
    if kind not in _PRUNABLE:
        raise UserError(f"heads of a {kind} model can't be removed: it must be one of {', '.join(_PRUNABLE)}")
    return [layer.attention for layer in model.base_model.encoder.layer]


def kept_heads(model: PreTrainedModel) -> dict[int, list[int]]:
    """Of every layer the heads that are there."""
    removed = removed_heads(model)
    all_heads = range(model.config.num_attention_heads)
    return {
        layer: [head for head in all_heads if head not in removed.get(layer, ())]
        for layer in range(len(attentions(model)))
    }


def removed_heads(model: PreTrainedModel) -> dict[int, list[int]]:
    """Of the layers that lack heads, which ones; {} for a model that has all."""
    return _union(getattr(model, _ATTRIBUTE, []))


def remove_heads(model: PreTrainedModel, heads: Heads) -> None:
    """Cut heads out of the matrices of a model, in place: it computes as if their outputs were zero.

    Args:
        model: any model of a prunable family; it may lack heads already.
        heads: what to remove.

    Raises:
        UserError: the model is of another family.
        ValueError: a head is not there, or a layer would be left without any.
    """
    kept = kept_heads(model)
    for layer, gone in heads.items():
        if not set(gone) <= set(kept.get(layer, ())) or len(set(gone)) != len(gone):
            raise ValueError(f"layer {layer} has the heads {kept.get(layer, [])}: {list(gone)} can't be removed")
        if len(gone) == len(kept[layer]):
            raise ValueError(f"layer {layer} would be left without a head")
    modules = attentions(model)
    for layer, gone in heads.items():
        if gone:
            _cut(modules[layer], [place for place, head in enumerate(kept[layer]) if head not in gone])
    removal = {layer: sorted(gone) for layer, gone in sorted(heads.items()) if gone}
    setattr(model, _ATTRIBUTE, [*getattr(model, _ATTRIBUTE, []), *([removal] if removal else [])])


def _cut(attention: nn.Module, places: Sequence[int]) -> None:
    """Leave the heads at ``places``."""
    module, projection = attention.self, attention.output.dense
    rows = _rows(places, module.attention_head_size).to(projection.weight.device)
    for linear in _inputs(attention):
        linear.weight, linear.bias = nn.Parameter(linear.weight.data[rows]), nn.Parameter(linear.bias.data[rows])
        linear.out_features = len(rows)
    projection.weight = nn.Parameter(projection.weight.data[:, rows])
    projection.in_features = len(rows)
    module.num_attention_heads, module.all_head_size = len(places), len(rows)


def _inputs(attention: nn.Module) -> list[nn.Linear]:
    return [attention.self.query, attention.self.key, attention.self.value]


def _rows(heads: Sequence[int], head_size: int) -> torch.Tensor:
    """Where these heads lie in a matrix of all."""
    return (torch.tensor(heads)[:, None] * head_size + torch.arange(head_size)).flatten()


@torch.no_grad()
def full_size(classifier: PreTrainedModel) -> PreTrainedModel:
    """A copy in the shapes of the unpruned model, which transformers loads, equal in its outputs; on the CPU.

    Removed heads have zeros in query, key and value, and in their columns of the output projection.
    """
    whole = AutoModelForSequenceClassification.from_config(classifier.config).to(classifier.dtype)
    shapes = {name: weight.shape for name, weight in whole.state_dict().items()}
    weights = {name: weight for name, weight in classifier.state_dict().items() if weight.shape == shapes[name]}
    whole.load_state_dict(weights, strict=False)
    kept = kept_heads(classifier).values()
    for target, source, heads in zip(attentions(whole), attentions(classifier), kept, strict=True):
        rows = _rows(heads, source.self.attention_head_size)
        for linear, smaller in zip(_inputs(target), _inputs(source), strict=True):
            linear.weight.zero_()[rows] = smaller.weight.cpu()
            linear.bias.zero_()[rows] = smaller.bias.cpu()
        target.output.dense.weight.zero_()[:, rows] = source.output.dense.weight.cpu()
    return whole.eval()


def write_pruned_heads(folder: Path, model: PreTrainedModel) -> None:
    """Put the record of a pruned model into its folder; nothing for one that has all its heads.

    ``heads`` of each layer in the unpruned model, ``removed`` by layer, and ``history``: the same removal by removal.
    """
    removals = getattr(model, _ATTRIBUTE, [])
    if removals:
        heads = [model.config.num_attention_heads] * len(attentions(model))
        write_json(folder / PRUNED_HEADS_FILE, {"heads": heads, "removed": _union(removals), "history": removals})


def read_pruned_heads(folder: Path) -> dict[int, list[int]]:
    """The heads that the model in this folder lacks; {} for one that has all.

    Raises:
        UserError: the record is damaged.
    """
    return _union(_read_removals(folder))


def remove_recorded_heads(model: PreTrainedModel, folder: Path) -> None:
    """Give an unpruned model the shapes of the one in ``folder``, its history included.

    Raises:
        UserError: the record is damaged, or not of this architecture.
    """
    try:
        for removal in _read_removals(folder):
            remove_heads(model, removal)
    except ValueError as error:
        raise UserError(f"{folder / PRUNED_HEADS_FILE} is not of the model beside it: {error}") from None


def _read_removals(folder: Path) -> list[dict[int, list[int]]]:
    path = folder / PRUNED_HEADS_FILE
    if not path.exists():
        return []
    what = "it tells which heads the model beside it lacks"
    record: Any = read_json(path, what)
    try:
        return [
            {int(layer): [int(head) for head in heads] for layer, heads in removal.items()}
            for removal in record["history"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: {what}") from None


def _union(removals: Sequence[Heads]) -> dict[int, list[int]]:
    layers = sorted({layer for removal in removals for layer in removal})
    return {layer: sorted(head for removal in removals for head in removal.get(layer, ())) for layer in layers}
