"""The global shuffle is an exact permutation that looks random."""

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from data_prep.shuffle import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_536, 100_003])
def test_every_index_appears_exactly_once(size: int) -> None:
    shuffled = Permutation(size, seed=7)(np.arange(size))
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(size))


def test_any_part_can_be_made_alone() -> None:
    permutation = Permutation(100_003, seed=7)
    whole = permutation(np.arange(100_003))
    np.testing.assert_array_equal(permutation(np.arange(5000, 5100)), whole[5000:5100])


def test_seeds_give_unrelated_orders() -> None:
    first, second = (Permutation(50_000, seed)(np.arange(50_000)) for seed in (1, 2))
    assert abs(spearmanr(first, second).statistic) < 0.03


def test_neighbours_land_anywhere() -> None:
    size = 100_000
    shuffled = Permutation(size, seed=3)(np.arange(size))
    gaps = np.diff(shuffled)
    # The gap of two independent uniform positions has a triangular distribution.
    uniform = np.where(gaps < 0, 0.5 * (1 + gaps / size) ** 2, 1 - 0.5 * (1 - gaps / size) ** 2)
    assert kstest(uniform, "uniform").pvalue > 1e-4
    assert abs(spearmanr(np.arange(size), shuffled).statistic) < 0.02
