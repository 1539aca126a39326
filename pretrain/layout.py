"""Where the sequences of a micro-batch lie in the model's hidden states.

Packed, they lie end to end in a fixed number of slots, so that matrix products, norms and the head compute next to no
padding: ``[slots, hidden]``. Attention alone, 1 to 8 % of the work at length 128, takes them apart into rows of their
own and puts the result back. Rows of several sequences under a block mask would do without that, but compute all pairs
of tokens of a row: at 512 slots four times the attention, which costs more than the padding did (docs/performance.md).

Padded, each sequence has a row of its own everywhere: ``[sequences, length, hidden]``.
"""

import torch


class _Move(torch.autograd.Function):
    """Rows of ``x`` in another order; ``back`` inverts ``there`` wherever anything is read.

    A gather's own gradient would be a scatter. Here it is a gather, too: faster, and the same at every run.
    """

    @staticmethod
    def forward(context, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(context, gradient: torch.Tensor):
        (back,) = context.saved_tensors
        return gradient.index_select(0, back), None, None


class PaddedLayout:
    """A row for each sequence.

    Args:
        sequence_length: int64, [sequences]; 0 for a row that is not used.
        length: of a row.
    """

    def __init__(self, sequence_length: torch.Tensor, length: int) -> None:
        self.attention_mask = _attention_mask(sequence_length, length)
        self.position_ids = torch.arange(length, device=sequence_length.device)

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[sequences, length, hidden] of what the model computes on."""
        return hidden

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return rows


class PackedLayout:
    """Sequences end to end. At least the last slot is never used: it stands for all padding.

    Args:
        sequence_length: int64, [sequences]; 0 for a sequence that is not there.
        length: the longest that a sequence can be.
        slots: of all sequences together: more than their tokens, fewer than ``sequences * length``.
    """

    def __init__(self, sequence_length: torch.Tensor, length: int, slots: int) -> None:
        device, sequences = sequence_length.device, len(sequence_length)
        self._rows = (sequences, length)
        self.attention_mask = _attention_mask(sequence_length, length)
        stops = sequence_length.cumsum(0)
        starts = stops - sequence_length
        slot = torch.arange(slots, device=device)
        sequence = torch.searchsorted(stops, slot, right=True).clamp(max=sequences - 1)
        used = slot < stops[-1]
        self.position_ids = torch.where(used, slot - starts[sequence], 0)
        column = torch.arange(length, device=device)
        real = column < sequence_length[:, None]
        # Index maps between [slots] and [sequences * length]. Padding is a slot and a place that nothing reads, whose
        # gradients are therefore zero: the last slot, and the end of the shortest sequence's row.
        padding_place = (sequence_length.argmin() + 1) * length - 1
        self._slot_of_place = torch.where(real, starts[:, None] + column, slots - 1).flatten()
        self._place_of_slot = torch.where(used, sequence * length + self.position_ids, padding_place)

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[sequences, length, hidden] of [slots, hidden]."""
        return _Move.apply(hidden, self._slot_of_place, self._place_of_slot).unflatten(0, self._rows)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return _Move.apply(rows.flatten(0, 1), self._place_of_slot, self._slot_of_place)


Layout = PaddedLayout | PackedLayout


def _attention_mask(sequence_length: torch.Tensor, length: int) -> torch.Tensor:
    """[sequences, 1, 1, length], true where there is a token.

    A row without any attends to its first place: a softmax over nothing would be NaN.
    """
    column = torch.arange(length, device=sequence_length.device)
    return (column < sequence_length.clamp(min=1)[:, None])[:, None, None, :]
