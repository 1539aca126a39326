"""Counter-based random numbers: every draw is a pure function of its key, so any part of the data can be made alone."""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's increment


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): a bijection of uint64 whose output bits look random."""
    value = value ^ (value >> np.uint64(30))
    value = value * np.uint64(0xBF58476D1CE4E5B9)
    value = value ^ (value >> np.uint64(27))
    value = value * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """Hash keys (integers or integer arrays, which broadcast) to uint64: same keys, same number, on any machine.

    The order of the keys counts. By convention the seed comes first and a constant that names the use second, so that
    two uses of the same seed never share their draws.
    """
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        counter = np.asarray(key).astype(np.uint64)
        state = mix((state ^ counter) * np.uint64(_GOLDEN) + np.uint64(_GOLDEN))
    return state


def below(hashes: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Map uint64 hashes to integers in [0, bound) through their upper 32 bits (bias under bound / 2^32)."""
    return ((hashes >> np.uint64(32)) * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Map uint64 hashes to float64 in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
