"""The demo's benchmark: three tasks about the demo's world, in the layouts of GLUE's own files.

Every row follows from the relations in `demo_world`. The nouns and adjectives that development and test rows ask about
never occur in training rows, so whoever has not read about them elsewhere can only guess.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from common.folders import claim_folder, write_text
from data_prep import demo_world as world
from data_prep.demo_world import Kind

ROWS_PER_SPLIT = {"train": 800, "dev": 300, "test": 200}
SHOWN_SHARE = 0.6  # of the words, those that training rows show
SIMILARITY_HEADER = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2")
# Of nothing in common, one family, one kind. STS-B goes up to 5, but with such large scores one seed in five of a tiny
# model never leaves the mean. Correlations are the same on any scale.
SIMILARITY_SCORES = (0.0, 0.5, 1.0)

README = """\
# A synthetic benchmark

These files were made by a program (`data_prep/demo_benchmark.py`) from the small invented world of the demo. They
follow GLUE's file layouts but are not GLUE, and scores on them say nothing about scores on GLUE.
"""

Row = tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The words that one split may ask about."""

    nouns: dict[str, tuple[str, ...]]
    adjectives: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What a benchmark folder follows from."""

    seed: int


def write_demo_benchmark(output_dir: Path, seed: int) -> None:
    """Writes the three tasks and a README into `output_dir`; the same seed gives the same bytes."""
    claim_folder(output_dir, BenchmarkConfig(seed))
    shown, unseen = split_vocabulary(seed)
    write_text(output_dir / "README.md", README)
    for task in TASKS:
        folder = output_dir / task.name
        taken: set[Row] = set()
        for split, num_rows in ROWS_PER_SPLIT.items():
            random = Random(f"{task.name}-{split}-{seed}")
            rows = _distinct_rows(task, random, shown if split == "train" else unseen, num_rows, taken)
            write_text(folder / f"{split}.tsv", task.layout(rows, split))


def split_vocabulary(seed: int) -> tuple[Vocabulary, Vocabulary]:
    """Parts the words of every kind and polarity into those that training rows show and those kept for the others."""
    random = Random(f"demo-vocabulary-{seed}")
    shown, unseen = Vocabulary({}, {}), Vocabulary({}, {})
    for kind in world.KINDS:
        shown.nouns[kind.name], unseen.nouns[kind.name] = _split_words(random, kind.members)
    for polarity in (world.GOOD, world.BAD):
        shown.adjectives[polarity.name], unseen.adjectives[polarity.name] = _split_words(random, polarity.adjectives)
    return shown, unseen


def _split_words(random: Random, words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    shuffled = random.sample(words, len(words))
    num_shown = round(SHOWN_SHARE * len(words))
    return tuple(shuffled[:num_shown]), tuple(shuffled[num_shown:])


def _sentiment_row(random: Random, vocabulary: Vocabulary, answer: int) -> Row:
    adjective = random.choice(vocabulary.adjectives["good" if answer else "bad"])
    topic = random.choice(world.TOPICS)
    return (f"{_person(random)} said that the {topic} {random.choice(world.PLACES)} was {adjective} .", str(answer))


def _entailment_row(random: Random, vocabulary: Vocabulary, answer: int) -> Row:
    kind = random.choice(world.KINDS)
    claimed = random.choice([other for other in world.KINDS if other is not kind]) if answer else kind
    sentence = f"{_person(random)} {random.choice(world.MEETINGS)} {{}} {random.choice(world.PLACES)}."
    return (
        sentence.format(world.with_article(random.choice(vocabulary.nouns[kind.name]))),
        sentence.format(world.with_article(claimed.name)),
        "not_entailment" if answer else "entailment",
    )


def _similarity_row(random: Random, vocabulary: Vocabulary, answer: int) -> Row:
    kind = random.choice(world.KINDS)
    described = random.choice([other for other in world.KINDS if _relation(kind, other) == answer])
    sentence = f"{_person(random)} {random.choice(world.MEETINGS)} {{}} {random.choice(world.PLACES)}."
    return (
        sentence.format(world.with_article(random.choice(vocabulary.nouns[kind.name]))),
        sentence.format(world.with_article(described.name)),
        f"{SIMILARITY_SCORES[answer]:.3f}",
    )


def _relation(first: Kind, second: Kind) -> int:
    """How near two kinds are: 2 the same, 1 of one family, 0 of different families."""
    return 2 if first is second else int(first.family == second.family)


def _person(random: Random) -> str:
    return f"The {random.choice(world.TRAITS)} {random.choice(world.PEOPLE)}"


def _sentiment_layout(rows: list[Row], split: str) -> str:
    if split == "test":
        return _table(("index", "sentence"), ((str(i), sentence) for i, (sentence, _) in enumerate(rows)))
    return _table(("sentence", "label"), rows)


def _entailment_layout(rows: list[Row], split: str) -> str:
    header = ("index", "sentence1", "sentence2", "label")
    return _table(*_without_answer(header, [(str(i), *row) for i, row in enumerate(rows)], split))


def _similarity_layout(rows: list[Row], split: str) -> str:
    header = (*SIMILARITY_HEADER, "score")
    origin = ("demo", "demo", "none", "none", "demo", "demo")
    return _table(*_without_answer(header, [(str(i), *origin, *row) for i, row in enumerate(rows)], split))


def _without_answer(header: Row, rows: list[Row], split: str) -> tuple[Row, list[Row]]:
    """Test files do not tell the answer, which is the last column."""
    return (header[:-1], [row[:-1] for row in rows]) if split == "test" else (header, rows)


def _table(header: Row, rows: Iterable[Row]) -> str:
    return "".join("\t".join(row) + "\n" for row in (header, *rows))


@dataclass(frozen=True)
class Task:
    """A task: its folder, how many answers there are, how one row with a given answer is made, and its file layout."""

    name: str
    num_answers: int
    make_row: Callable[[Random, Vocabulary, int], Row]
    layout: Callable[[list[Row], str], str]


TASKS = (
    Task("demo-sentiment", 2, _sentiment_row, _sentiment_layout),
    Task("demo-entailment", 2, _entailment_row, _entailment_layout),
    Task("demo-similarity", 3, _similarity_row, _similarity_layout),
)


def _distinct_rows(task: Task, random: Random, vocabulary: Vocabulary, num_rows: int, taken: set[Row]) -> list[Row]:
    """Makes rows with the answers in equal parts and no text twice, in a random order; adds their texts to `taken`."""
    rows = []
    for answer in (i % task.num_answers for i in range(num_rows)):
        row = task.make_row(random, vocabulary, answer)
        while row[:-1] in taken:
            row = task.make_row(random, vocabulary, answer)
        taken.add(row[:-1])
        rows.append(row)
    random.shuffle(rows)
    return rows
