"""A tiny encoder as Hugging Face saves it, and two small tasks in GLUE's layouts that can be learned."""

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizerFast

from finetune.batches import DeviceSplit
from finetune.examples import Examples, read_task
from finetune.tasks import TASKS, Task
from finetune.tokens import load_tokens, tokenize_split
from run_glue_grid import main
from tests.finetune.grids import arguments, write_config

NOUNS = "cat dog film book house tree river stone lamp road".split()
GOOD, BAD = "good great fine lovely".split(), "bad poor awful dull".split()
WORDS = ["the", "was", "and", "a", *NOUNS, *GOOD, *BAD]
STSB_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()


def write_rows(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(random: Random, adjectives: list[str]) -> str:
    return " ".join(f"the {random.choice(NOUNS)} was {random.choice(adjectives)}" for _ in range(random.randint(1, 4)))


def write_small_tasks(folder: Path, num_train: int = 48, num_dev: int = 16) -> Path:
    """SST-2: is it good? STS-B: are both good?"""
    random = Random(0)
    for split, num_rows in (("train", num_train), ("dev", num_dev)):
        sentiment, similarity = [["sentence", "label"]], [STSB_HEADER]
        for index in range(num_rows):
            first, second = random.choice((GOOD, BAD)), random.choice((GOOD, BAD))
            sentiment.append([sentence(random, first), str(int(first is GOOD))])
            score = 2.0 * (first is GOOD) + 2.0 * (second is GOOD)
            texts = [sentence(random, first), sentence(random, second)]
            similarity.append([str(index), "g", "f", "y", "o", "s", "s", *texts, f"{score:.3f}"])
        write_rows(folder / "SST-2" / f"{split}.tsv", sentiment)
        write_rows(folder / "STS-B" / f"{split}.tsv", similarity)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """So that what is computed does not depend on the machine's cores, and small models are not slower for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_tasks(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "hf"
    folder.mkdir()
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    vocabulary.unlink()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(
    glue_dir: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, DeviceSplit]]:
    """Both small tasks as a trial takes them."""
    tokenizer, cache = AutoTokenizer.from_pretrained(model_folder), tmp_path_factory.mktemp("cache")

    def tokens(task: Task, examples: Examples) -> DeviceSplit:
        return DeviceSplit(
            load_tokens(tokenize_split(examples, task, tokenizer, "words", 32, cache)), torch.device("cpu")
        )

    return {
        name: {split: tokens(TASKS[name], examples) for split, examples in read_task(TASKS[name], glue_dir).items()}
        for name in ("sst2", "stsb")
    }


@pytest.fixture(scope="session")
def finished_grid(model_folder: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a grid that ran to its end."""
    folder = tmp_path_factory.mktemp("grid")
    argv = arguments(write_config(folder), model_folder, folder / "G", glue_dir)
    main(argv)
    return argv
