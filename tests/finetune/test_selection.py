import itertools
import statistics
from random import Random

from finetune.selection import best_cells, may_be_best, median_cell
from finetune.trial import Cell

RATES, SEEDS = (1e-5, 3e-5, 5e-5), (1, 2, 3)
CELLS = [Cell("rte", rate, 32, 3, "pretrained", seed) for rate in RATES for seed in SEEDS]
SCORES = (0.0, 0.5, 1.0)


def test_the_best_configuration_has_the_highest_median_and_the_first_of_equals_wins():
    random = Random(0)
    for _ in range(200):
        scores = {cell: random.choice(SCORES) for cell in CELLS}
        medians = [statistics.median(scores[cell] for cell in CELLS if cell.learning_rate == rate) for rate in RATES]
        assert best_cells(CELLS, scores)[0].learning_rate == RATES[medians.index(max(medians))]


def test_the_median_cell_scores_the_median_or_the_lower_one_of_two():
    random = Random(0)
    for number in (1, 2, 3, 4, 5):
        cells = [Cell("rte", 1e-5, 32, 3, "pretrained", seed) for seed in range(number)]
        scores = {cell: random.random() for cell in cells}
        assert scores[median_cell(cells, scores)] == sorted(scores.values())[(number - 1) // 2]


def test_what_some_outcome_of_the_open_trials_makes_best_is_never_given_up():
    """Compared with every outcome there can be, tried one by one."""
    random = Random(1)
    num_given_up = num_impossible = 0
    for _ in range(60):
        done = random.sample(CELLS, k=random.randint(5, len(CELLS)))
        scores = {cell: random.choice(SCORES) for cell in done}
        still_open = [cell for cell in CELLS if cell not in scores]
        possible = set()
        for outcome in itertools.product((-1.0, *SCORES, 2.0), repeat=len(still_open)):
            possible.add(best_cells(CELLS, {**scores, **dict(zip(still_open, outcome, strict=True))})[0].configuration)
        kept = may_be_best(CELLS, scores)
        assert possible <= kept
        num_given_up += len(RATES) - len(kept)
        num_impossible += len(RATES) - len(possible)
    assert num_given_up > num_impossible / 2 > 10, "and most of what can't be is given up"
