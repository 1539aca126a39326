"""The demo's world, its corpus and its benchmark."""

import csv
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data_prep.demo_benchmark import write_demo_benchmark
from data_prep.demo_corpus import demo_documents
from data_prep.demo_world import BAD, FAMILY_DEEDS, FAMILY_USES, GOOD, KINDS, PLACES, third_person

HEADERS = {
    "demo-sentiment": "sentence label",
    "demo-entailment": "index sentence1 sentence2 label",
    "demo-similarity": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}
TEST_HEADERS = {
    "demo-sentiment": "index sentence",
    "demo-entailment": "index sentence1 sentence2",
    "demo-similarity": "index genre filename year old_index source1 source2 sentence1 sentence2",
}
KIND_OF = {member: kind for kind in KINDS for member in kind.members}
KIND_NAMED = {kind.name: kind for kind in KINDS}
ASKED_WORDS = KIND_OF.keys() | set(GOOD.adjectives) | set(BAD.adjectives)


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_demo_benchmark(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(demo_documents(seed=1, megabytes=1))


def words_in(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def read_rows(folder: Path, task: str, split: str) -> list[dict[str, str]]:
    with (folder / task / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def labelled_rows(folder: Path, task: str) -> list[dict[str, str]]:
    return read_rows(folder, task, "train") + read_rows(folder, task, "dev")


def texts_of(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(text for column, text in row.items() if column.startswith("sentence")) for row in rows]


def asked_words_in(rows: list[dict[str, str]]) -> set[str]:
    return {word for texts in texts_of(rows) for text in texts for word in words_in(text)} & ASKED_WORDS


def only_word(sentence: str, choices: set[str]) -> str:
    """The one word of the sentence that is among the choices."""
    (word,) = [word for word in words_in(sentence) if word in choices]
    return word


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's content, but for the record of when and where it was made."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_seed_gives_the_same_benchmark(benchmark_dir: Path, tmp_path: Path) -> None:
    write_demo_benchmark(tmp_path, seed=1)
    assert all_bytes(tmp_path) == all_bytes(benchmark_dir)


def test_another_seed_gives_another_benchmark(benchmark_dir: Path, tmp_path: Path) -> None:
    write_demo_benchmark(tmp_path, seed=2)
    ours, theirs = all_bytes(tmp_path), all_bytes(benchmark_dir)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours if name.endswith(".tsv"))


def test_nothing_but_the_tasks_and_the_readme_is_left_in_the_folder(benchmark_dir: Path) -> None:
    splits = {f"{task}/{split}.tsv" for task in HEADERS for split in ("train", "dev", "test")}
    assert set(all_bytes(benchmark_dir)) == splits | {"README.md", "config.yaml"}


def test_the_readme_says_that_this_is_not_glue(benchmark_dir: Path) -> None:
    readme = (benchmark_dir / "README.md").read_text(encoding="utf-8")
    assert "synthetic" in readme
    assert "not GLUE" in readme


@pytest.mark.parametrize("task", HEADERS)
def test_files_have_the_layout_of_glue(benchmark_dir: Path, task: str) -> None:
    for split, num_rows in (("train", 800), ("dev", 300), ("test", 200)):
        lines = (benchmark_dir / task / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        header = (TEST_HEADERS if split == "test" else HEADERS)[task].split()
        assert lines[0].split("\t") == header
        assert len(lines) == 1 + num_rows
        assert {line.count("\t") for line in lines} == {len(header) - 1}


@pytest.mark.parametrize("task", HEADERS)
def test_words_asked_about_in_dev_and_test_never_occur_in_train(benchmark_dir: Path, task: str) -> None:
    shown = asked_words_in(read_rows(benchmark_dir, task, "train"))
    for split in ("dev", "test"):
        asked = asked_words_in(read_rows(benchmark_dir, task, split))
        assert asked
        assert not asked & shown


@pytest.mark.parametrize("task", HEADERS)
def test_no_text_occurs_twice(benchmark_dir: Path, task: str) -> None:
    texts = [text for split in ("train", "dev", "test") for text in texts_of(read_rows(benchmark_dir, task, split))]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("task", "answer", "num_answers"),
    [("demo-sentiment", "label", 2), ("demo-entailment", "label", 2), ("demo-similarity", "score", 3)],
)
def test_answers_are_balanced(benchmark_dir: Path, task: str, answer: str, num_answers: int) -> None:
    for split in ("train", "dev"):
        counts = Counter(row[answer] for row in read_rows(benchmark_dir, task, split)).values()
        assert len(counts) == num_answers
        assert max(counts) - min(counts) <= 1


def test_sentiment_labels_follow_from_the_adjective(benchmark_dir: Path) -> None:
    for row in labelled_rows(benchmark_dir, "demo-sentiment"):
        adjective = only_word(row["sentence"], set(GOOD.adjectives) | set(BAD.adjectives))
        assert row["label"] == ("1" if adjective in GOOD.adjectives else "0")


def test_entailment_labels_follow_from_the_kinds(benchmark_dir: Path) -> None:
    for row in labelled_rows(benchmark_dir, "demo-entailment"):
        kind = KIND_OF[only_word(row["sentence1"], set(KIND_OF))]
        claimed = KIND_NAMED[only_word(row["sentence2"], set(KIND_NAMED))]
        assert row["label"] == ("entailment" if claimed is kind else "not_entailment")


def test_similarity_scores_follow_from_kinds_and_families(benchmark_dir: Path) -> None:
    for row in labelled_rows(benchmark_dir, "demo-similarity"):
        kind = KIND_OF[only_word(row["sentence1"], set(KIND_OF))]
        described = KIND_NAMED[only_word(row["sentence2"], set(KIND_NAMED))]
        expected = 1.0 if described is kind else 0.5 if described.family == kind.family else 0.0
        assert float(row["score"]) == expected


@pytest.mark.parametrize("task", ["demo-entailment", "demo-similarity"])
def test_the_two_sentences_of_a_pair_differ_in_nothing_but_the_thing(benchmark_dir: Path, task: str) -> None:
    for first, second in texts_of(labelled_rows(benchmark_dir, task)):
        differing = set(words_in(first)) ^ set(words_in(second))
        assert differing - {"a", "an"} == differing & (KIND_OF.keys() | KIND_NAMED.keys())
        assert len(differing - {"a", "an"}) == 2


def test_no_word_is_of_two_kinds_or_both_good_and_bad() -> None:
    words = [member for kind in KINDS for member in kind.members] + [*KIND_NAMED, *GOOD.adjectives, *BAD.adjectives]
    assert len(set(words)) == len(words)


def test_places_name_no_word_that_the_benchmark_asks_about() -> None:
    assert not {word for place in PLACES for word in words_in(place)} & (ASKED_WORDS | KIND_NAMED.keys())


def test_what_holds_for_a_family_is_known_for_every_kind() -> None:
    families = {kind.family for kind in KINDS}
    assert families == FAMILY_DEEDS.keys() == FAMILY_USES.keys()


def test_a_document_does_not_depend_on_how_much_is_asked_for(corpus: list[str]) -> None:
    few = list(demo_documents(seed=1, megabytes=0.01))
    assert 10 < len(few) < len(corpus)
    assert few == corpus[: len(few)]


def test_another_seed_tells_other_stories(corpus: list[str]) -> None:
    others = list(islice(demo_documents(seed=2, megabytes=1), 100))
    assert sum(ours == theirs for ours, theirs in zip(corpus, others, strict=False)) < 5


def test_the_corpus_is_as_large_as_asked_for(corpus: list[str]) -> None:
    size = sum(len(document.encode("utf-8")) for document in corpus)
    assert 1_000_000 <= size < 1_000_000 + len(corpus[-1].encode("utf-8"))


def test_articles_agree_with_the_word_that_follows(corpus: list[str], benchmark_dir: Path) -> None:
    texts = [*corpus, *(path.read_text(encoding="utf-8") for path in benchmark_dir.rglob("*.tsv"))]
    found = Counter()
    for article, initial in re.findall(r"\b([Aa]n?) (\w)", "\n".join(texts)):
        assert (article.lower() == "an") == (initial in "aeiou"), (article, initial)
        found[article.lower()] += 1
    assert min(found["a"], found["an"]) > 1000


def test_verbs_agree_with_their_subjects(corpus: list[str]) -> None:
    verbs = {action.base for kind in KINDS for action in (*kind.deeds, *FAMILY_DEEDS[kind.family])}
    text = "\n".join(corpus)
    after_many = set(re.findall(r"All (?:birds|fish|fruits|vegetables|tools|instruments) (\w+)", text))
    after_one = set(re.findall(r"Every (?:bird|fish|fruit|vegetable|tool|instrument) (\w+)", text))
    assert len(after_many) > 30
    assert after_many <= verbs
    assert len(after_one) > 30
    assert not after_one & verbs
    assert all(verb.endswith("s") for verb in after_one)


@pytest.mark.parametrize(
    ("verb", "expected"),
    [("sing", "sings"), ("fly", "flies"), ("play", "plays"), ("echo", "echoes"), ("go", "goes"), ("catch", "catches")],
)
def test_third_person_is_spelt_right(verb: str, expected: str) -> None:
    assert third_person(verb) == expected


def test_documents_are_sentences_with_a_capital_and_a_full_stop(corpus: list[str]) -> None:
    for document in corpus[:2000]:
        assert re.fullmatch(r"([A-Z][a-z, ]*[a-z]\.( |$))+", document), document


def test_every_word_asked_about_is_met_often_in_the_corpus(corpus: list[str]) -> None:
    counts = Counter(words_in("\n".join(corpus)))
    assert min(counts[word] for word in ASKED_WORDS | KIND_NAMED.keys()) >= 50
