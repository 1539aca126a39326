"""A build goes on with the sources it began with, or not at all; the hub is asked once and its commit kept."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source, first_document
from data_prep.sources import pin_sources

TEXTS = [f"Document {number} tells of {number} herons in the reeds. They wait." for number in range(400)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 70_000 + "\n\n" + "\n\n".join(TEXTS) + "\n\n" + "y" * 70_000, encoding="utf-8")
    return path


@pytest.fixture
def config(text) -> DataConfig:
    return DataConfig([Source("text", str(text))], "train", vocab_size=300, dupe_factor=3, rows_per_shard=400)


@pytest.mark.parametrize(("old", "new"), [("herons", "egrets"), ("herons", "heron ")])
def test_a_folder_is_not_mended_from_another_text(old, new, config, text, tmp_path) -> None:
    out = tmp_path / "data"
    manifest = build(config, out)
    assert len(manifest["shards"]) > 3
    content = {path.name: path.read_bytes() for path in out.glob("*.h5")}
    # The same size and the same ends, so that only the shards can tell.
    text.write_text(text.read_text().replace(old, new))
    (out / "train-00001.h5").unlink()
    with pytest.raises(UserError, match=r"can't be (made again|mended)"):
        build(config, out)
    assert {path.name: path.read_bytes() for path in out.glob("*.h5")} == {
        name: data for name, data in content.items() if name != "train-00001.h5"
    }
    assert not list(out.glob(".*.tmp"))
    text.write_text(text.read_text().replace(new, old))
    assert build(config, out) == manifest
    assert {path.name: path.read_bytes() for path in out.glob("*.h5")} == content


def test_other_versions_of_what_makes_tokens_are_refused_only_while_tokens_are_made(
    config, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "data"
    manifest = build(config, out)
    record = {key: manifest[key] for key in ("sources", "versions")}
    monkeypatch.setattr("data_prep.sources.importlib.metadata.version", lambda name: "0.1")
    assert build(config, out) == manifest
    (out / "manifest.json").unlink()
    (out / "work").mkdir()
    (out / "work" / "sources.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"begun with tokenizers .*, this is 0\.1"):
        build(config, out)


def test_a_tokenizer_that_changed_is_refused_while_the_build_goes_on(config, tmp_path) -> None:
    build(config, tmp_path / "first")
    own = tmp_path / "tokenizer.json"
    shutil.copy(tmp_path / "first" / "tokenizer" / "tokenizer.json", own)
    config = replace(config, tokenizer=str(own))
    build(config, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    own.write_text(own.read_text().replace('"heron', '"egret'))
    with pytest.raises(UserError, match=r"tokenizer\.json changed since"):
        build(config, tmp_path / "data")


class Hub:
    """The hub as far as a build asks it: data sets and their newest commit."""

    def __init__(self, monkeypatch) -> None:
        self.commit, self.loaded = "a" * 40, []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: self.builder())

    def dataset_info(self, path: str, revision: str | None, timeout: float) -> SimpleNamespace:
        if self.commit is None:
            raise ConnectionResetError("no route to the hub")
        return SimpleNamespace(sha=self.commit)

    def load_dataset(self, path, config, split, revision, streaming) -> datasets.IterableDataset:
        self.loaded.append((path, config, split, revision))
        return datasets.Dataset.from_dict({"title": TEXTS, "text": TEXTS}).to_iterable_dataset()

    def builder(self) -> SimpleNamespace:
        size = SimpleNamespace(num_examples=len(TEXTS), num_bytes=30_000)
        return SimpleNamespace(info=SimpleNamespace(splits={"train": size}))


def test_a_data_set_is_read_at_the_commit_with_which_the_build_began(config, tmp_path, monkeypatch) -> None:
    hub = Hub(monkeypatch)
    config = replace(config, sources=[Source("huggingface", "org/set", config="en")])
    manifest = build(config, tmp_path / "data")
    assert {commit for *_, commit in hub.loaded} == {"a" * 40}
    assert manifest["sources"][0]["revision"] == "a" * 40

    # Now the branch has moved, and a shard is lost; then there is no hub to ask, and nothing to do.
    hub.commit, hub.loaded = "b" * 40, []
    (tmp_path / "data" / "train-00000.h5").unlink()
    assert build(config, tmp_path / "data") == manifest
    assert {commit for *_, commit in hub.loaded} == {"a" * 40}
    hub.commit = None
    assert build(config, tmp_path / "data") == manifest


def test_a_hub_that_can_t_tell_leaves_the_revision_as_it_was_given(monkeypatch) -> None:
    hub = Hub(monkeypatch)
    hub.commit = None
    sources = pin_sources([Source("huggingface", "org/set", revision="main")], None)
    assert sources[0].revision == "main"


def test_any_error_of_the_hub_is_one_line(monkeypatch) -> None:
    class TransportError(Exception):
        """What an HTTP library raises, derived from nothing more specific."""

    def fail(*args, **options):
        raise TransportError("name or service not known\nand much more")

    Hub(monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"can't read data set org/set \(en\): name or service not known$"):
        first_document(Source("huggingface", "org/set", config="en"))


def test_output_among_the_files_of_a_source_is_refused(config, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    config = replace(config, sources=[Source("jsonl", str(tmp_path))])
    with pytest.raises(UserError, match="lies inside the source"):
        build(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()
