"""A plan, made from a sample, foretells what the build then makes."""

from pathlib import Path

import datasets
import pytest

from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.demo_corpus import demo_documents
from data_prep.documents import Source
from data_prep.plan import make_plan


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    """Six text files, and a data set on disk."""
    folder = tmp_path_factory.mktemp("planned")
    documents = list(demo_documents(seed=3, megabytes=1.2))
    for number in range(6):
        (folder / f"{number}.txt").write_text("\n\n".join(documents[number::6]), encoding="utf-8")
    datasets.Dataset.from_dict({"text": documents[:3000]}).save_to_disk(folder / "saved")
    return [Source("text", str(folder / "*.txt")), Source("huggingface", str(folder / "saved"))]


def test_a_plan_from_a_part_comes_close_to_the_build(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.documents._BLOCK_BYTES", 50_000)
    config = DataConfig(sources, "train", vocab_size=500, max_seq_length=64, dupe_factor=3)
    plan = make_plan(config, sample_megabytes=0.2)
    manifest = build(config, tmp_path / "data")
    rows = sum(shard["rows"] for shard in manifest["shards"] if shard["split"] == "train")
    shards = sum((tmp_path / "data" / shard["file"]).stat().st_size for shard in manifest["shards"])
    assert 0.2e6 < plan.sampled_bytes < 1.5e6
    for planned, made in (
        (plan.num_documents, manifest["num_documents"]),
        (plan.num_sequences, manifest["num_sequences"]),
        (plan.num_tokens, manifest["num_tokens"]),
        (plan.padding_share, manifest["padding_share"]),
        (plan.rows, rows),
        (plan.shard_bytes, shards),
    ):
        assert planned == pytest.approx(made, rel=0.1)


def test_a_plan_writes_nothing_and_says_how_long_the_rows_last(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DataConfig(sources[:1], "train", vocab_size=500)
    plan = make_plan(config, sample_megabytes=100)
    assert plan.sampled_bytes == pytest.approx(1.2e6, rel=0.05)
    hours = plan.rows / (4 * 1000) / 3600
    assert f"{hours:,.1f} hours on 4 GPUs at 1,000 sequences/s" in plan.describe(config, 4, 1000)
    assert not list(Path.cwd().iterdir())
