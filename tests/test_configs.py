"""Every recipe that is shipped loads, and holds what its paper says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from common.cli import config_parser, parse, take_config
from data_prep.config import DataConfig
from finetune.grid import GridConfig
from pretrain.config import PretrainConfig
from pretrain.ds_config import load_ds_config
from pretrain.early_stop import TWENTY_FOUR_HOUR_BERT
from pretrain.rungs import Rung
from pretrain.search_config import SearchConfig

ROOT = Path(__file__).parent.parent
CONFIG_CLASSES = {"data": DataConfig, "pretrain": PretrainConfig, "search": SearchConfig, "glue": GridConfig}
RECIPES = sorted(ROOT.glob("configs/*/*.yaml"))


def load(path: Path):
    config_class = CONFIG_CLASSES[path.parent.name]
    return take_config(parse(config_parser("test", "", config_class), ["--config", str(path)]), config_class)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("folder", CONFIG_CLASSES)
def test_every_folder_has_a_demo(folder: str) -> None:
    assert (ROOT / "configs" / folder / "demo.yaml").exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda path: path.stem)
def test_ds_configs_hold_only_what_deepspeed_owns(path: Path) -> None:
    assert set(load_ds_config(str(path))) <= {"zero_optimization", "torch_autocast", "bf16", "data_types"}
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == (1 if "zero1" in path.stem else 0)


def test_the_budget_recipe_is_the_papers() -> None:
    recipe = load(ROOT / "configs/pretrain/24hbert.yaml")
    assert (recipe.model.preset, recipe.model.layer_norm) == ("bert-large", "pre_ln")
    assert (recipe.time_budget, recipe.train_batch_size, recipe.warmup_proportion) == ("24h", 4096, 0.06)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (2e-3, 0.01)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert recipe.gradient_clipping == 0.0
    data = load(ROOT / "configs/data/wikibook.yaml")
    assert (data.max_seq_length, data.dupe_factor, data.masked_lm_prob) == (128, 10, 0.15)
    assert (data.max_predictions_per_seq, data.short_seq_prob, data.validation_fraction) == (20, 0.1, 0.005)


@pytest.mark.parametrize(("name", "schedule_length"), [("bert-base-settings", "3d"), ("bert-large-settings", "8.3d")])
def test_the_reference_recipes_are_the_papers_table_2(name: str, schedule_length: str) -> None:
    recipe, budget = load(ROOT / f"configs/pretrain/{name}.yaml"), load(ROOT / "configs/pretrain/24hbert.yaml")
    assert recipe == replace(
        budget,
        train_batch_size=256,
        optimizer=replace(budget.optimizer, learning_rate=1e-4),
        warmup_proportion=0.111,
        schedule_length=schedule_length,
    )


def test_the_search_recipe_is_the_papers() -> None:
    search, best = load(ROOT / "configs/search/paper.yaml"), load(ROOT / "configs/pretrain/24hbert.yaml")
    assert search.space == {
        "train_batch_size": [4096, 8192, 16384],
        "optimizer.learning_rate": [5e-4, 1e-3, 2e-3],
        "warmup_proportion": [0, 0.02, 0.04, 0.06],
        "schedule_length": ["1d", "3d", "9d"],
    }
    assert (search.num_planned, len(search.grid()), search.gpus_per_run) == (108, 108, 8)
    assert search.pauses == [Rung("12h", "top 50 %")]
    runs = [search.run_config(parameters) for parameters in search.grid()]
    assert {(run.time_budget, *run.stop_rules) for run in runs} == {("24h", *TWENTY_FOUR_HOUR_BERT)}
    assert replace(best, schedule_length="1d") in [replace(run, early_stop=[]) for run in runs]


def test_the_search_demo_drops_at_every_rung_and_resumes_in_seconds() -> None:
    search = load(ROOT / "configs/search/demo.yaml")
    assert (search.num_planned, search.gpus_per_run) == (8, 1)
    assert [rung.bound for rung in search.rungs] == [6.0, None]
    assert search.pauses == search.rungs[1:]
    assert search.pretrain.budget_seconds <= 20


def test_the_grid_recipe_is_the_papers_table_5() -> None:
    grid = yaml.safe_load((ROOT / "configs/glue/paper.yaml").read_text())
    small, large = grid["grids"]
    assert small["tasks"] == ["rte", "sst2", "mrpc", "cola", "stsb", "wnli"]
    assert (small["learning_rate"], small["batch_size"]) == ([1e-5, 3e-5, 5e-5, 8e-5], [16, 32])
    assert small["num_epochs"] == [3, 5, 10]
    assert large["tasks"] == ["mnli", "qqp", "qnli"]
    assert (large["learning_rate"], large["batch_size"], large["num_epochs"]) == ([5e-5, 8e-5], [32], [3, 5])
    assert (grid["weight_decay"], grid["warmup_proportion"], len(grid["seeds"])) == (0.1, 0.06, 5)
