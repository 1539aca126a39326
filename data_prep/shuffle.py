"""One exact global shuffle without an array: a keyed bijection of [0, n)."""

import numpy as np

from data_prep.hashing import hash_keys, mix

_ROUNDS = 6
_SHUFFLE_DRAW = 31  # name of the draw, see hash_keys


class Permutation:
    """A pseudo-random permutation of [0, size): a balanced Feistel network with cycle walking (Black, Rogaway 2002).

    Any part of it can be evaluated alone, in constant memory, which is what makes shards independent of each other.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half_bits = max(1, (max(1, size - 1).bit_length() + 1) // 2)
        self._round_keys = hash_keys(seed, _SHUFFLE_DRAW, np.arange(_ROUNDS))

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where each index of [0, size) goes; int64, same shape."""
        value = self._feistel(index.astype(np.uint64))
        # The network permutes a power of four, at most four times too large: walk on until back inside.
        while (outside := value >= self.size).any():
            value[outside] = self._feistel(value[outside])
        return value.astype(np.int64)

    def _feistel(self, value: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = value >> bits, value & mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << bits) | right
