"""The runs that a plan compares: model presets with batch sizes."""

from dataclasses import dataclass, replace

from common.errors import UserError
from pretrain.architecture import PRESETS
from pretrain.config import PretrainConfig

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Candidate:
    """One of them."""

    model: str
    """For people: the preset, with a note where the configuration has set sizes of its own."""
    config: PretrainConfig
    options: str
    """What turns the given configuration into this one, as typed on the command line."""


def candidates_of(
    config: PretrainConfig, presets: list[str] | None, train_batch_sizes: list[int] | None
) -> list[Candidate]:
    """Every preset with every batch size, the smallest first.

    Args:
        config: of the run that is planned. Its own preset keeps the sizes that are set in it, others are as published.
        presets: default: the configured one, the next smaller and the next larger.
        train_batch_sizes: default: the configured one and twice as much.

    Raises:
        UserError: there is no such preset, or the run starts from a model, whose sizes are its own.
    """
    if unknown := [name for name in presets or () if name not in PRESETS]:
        raise UserError(f"there is no preset '{unknown[0]}': there are {', '.join(PRESETS)}")
    if config.init_from and presets:
        raise UserError("a model to start from has sizes of its own: leave --presets or --init_from out")
    order = list(PRESETS)
    own = order.index(config.model.preset)
    chosen = [order[own]] if config.init_from else presets or order[max(0, own - 1) : own + 2]
    batch_sizes = train_batch_sizes or [config.train_batch_size, 2 * config.train_batch_size]
    return [
        _candidate(config, preset, batch_size)
        for preset in sorted(set(chosen), key=order.index)
        for batch_size in sorted(set(batch_sizes))
    ]


def _candidate(config: PretrainConfig, preset: str, train_batch_size: int) -> Candidate:
    batch_option = f"--train_batch_size {train_batch_size}"
    sizes_set = [name for name in _SIZES if getattr(config.model, name) is not None]
    try:
        if config.init_from or preset == config.model.preset:
            name = config.init_from or preset + (" as set" if sizes_set else "")
            return Candidate(name, replace(config, train_batch_size=train_batch_size), batch_option)
        model = replace(config.model, preset=preset, **dict.fromkeys(_SIZES))
        other = replace(config, model=model, train_batch_size=train_batch_size, micro_batch_size="auto")
    except ValueError as error:
        raise UserError(str(error)) from None
    options = [f"--model.preset {preset}", *(f"--model.{name} null" for name in sizes_set), batch_option]
    return Candidate(preset, other, " ".join(options))
