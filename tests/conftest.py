"""What several test modules share: a small data folder, made once."""

import socket
from pathlib import Path

import pytest
import torchao  # noqa: F401  before pretrain, which does without, hides it from tests of finetune in this process

from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A data folder of the demo's corpus: about 1,900 training rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    source = Source("demo", megabytes=0.1)
    build(DataConfig([source], "train", vocab_size=800, max_seq_length=64, dupe_factor=5, rows_per_shard=700), folder)
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
