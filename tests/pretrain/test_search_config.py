"""A search is what its file says, and what cannot be searched is refused in one line that names the place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from common.folders import claim_folder
from pretrain.config import PretrainConfig
from pretrain.early_stop import StopRule
from pretrain.rungs import Rung
from pretrain.search_config import Hyperband, Range, SearchConfig

LEARNING_RATES = {"optimizer.learning_rate": [1e-3, 2e-3]}
SEARCH = {
    "pretrain": {"time_budget": "24h", "model": {"preset": "bert-base"}},
    "space": {
        "train_batch_size": [4096, 8192],
        "optimizer.learning_rate": [0.0005, 1e-3],
        "schedule_length": [None, "3d"],
    },
    "rungs": [{"at": "3h", "keep": "below 6.0"}, {"at": "75%", "keep": "top 25 %"}, {"at": "12h", "keep": "top 50 %"}],
}


def load(path: Path, *options: str) -> SearchConfig:
    arguments = parse(config_parser("test", "", SearchConfig), ["--config", str(path), *options])
    return take_config(arguments, SearchConfig)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(SEARCH, sort_keys=False))
    return path


def search(space: dict[str, Any] = LEARNING_RATES, pretrain: dict[str, Any] | None = None, **options: Any):
    return SearchConfig(PretrainConfig(**(pretrain or {})), space, **options)


def test_a_grid_is_every_combination_in_the_order_of_the_file(file: Path) -> None:
    config = load(file)
    names = ("train_batch_size", "optimizer.learning_rate", "schedule_length")
    rows = [
        (4096, 5e-4, None), (4096, 5e-4, "3d"), (4096, 1e-3, None), (4096, 1e-3, "3d"),
        (8192, 5e-4, None), (8192, 5e-4, "3d"), (8192, 1e-3, None), (8192, 1e-3, "3d"),
    ]  # fmt: skip
    assert config.grid() == [dict(zip(names, row, strict=True)) for row in rows]
    assert config.num_planned == 8


def test_a_runs_configuration_has_its_values_and_the_bounds_of_the_rungs(file: Path) -> None:
    config = load(file)
    run = config.run_config({"train_batch_size": 8192, "optimizer.learning_rate": 5e-4, "schedule_length": "3d"})
    optimizer = replace(config.pretrain.optimizer, learning_rate=5e-4)
    rules = [StopRule("3h", "validation_loss", 6.0)]
    assert run == replace(
        config.pretrain, train_batch_size=8192, optimizer=optimizer, schedule_length="3d", early_stop=rules
    )
    assert run.model.preset == "bert-base"


def test_runs_pause_at_the_rungs_that_compare_them_in_order_of_time(file: Path) -> None:
    assert load(file).pauses == [Rung("12h", "top 50 %"), Rung("75%", "top 25 %")]


def test_values_keep_their_type_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(
        "space:\n  seed: [1, 0, 2]\n  gradient_clipping: [0.0, 1.0, 1e-1]\n  schedule_length: [3d, null]\n"
        "  micro_batch_size: [auto, 16]\n"
    )
    space = load(path).space
    assert json.dumps(space) == json.dumps(
        {
            "seed": [1, 0, 2],
            "gradient_clipping": [0.0, 1.0, 0.1],
            "schedule_length": ["3d", None],
            "micro_batch_size": ["auto", 16],
        }
    )


def test_the_command_line_overrides_the_file(file: Path) -> None:
    config = load(file, "--pretrain.time_budget", "48h", "--gpus_per_run", "1", "--space.seed", "[1, 2]")
    assert (config.pretrain.time_budget, config.gpus_per_run, config.space["seed"]) == ("48h", 1, [1, 2])
    assert config.pretrain.model.preset == "bert-base"
    assert config.num_planned == 16


def test_ranges_and_hyperband_are_read(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(
        "{sampler: tpe, num_runs: 20, hyperband: {first: 2h}, space: {train_batch_size: {low: 64, high: 4096},"
        " optimizer.learning_rate: {low: 1e-4, high: 1.0e-2, log: true}}}"
    )
    config = load(path)
    assert config.space == {"train_batch_size": Range(64, 4096), "optimizer.learning_rate": Range(1e-4, 1e-2, log=True)}
    assert type(config.space["train_batch_size"].low) is int
    assert config.hyperband == Hyperband("2h", 3)
    assert config.num_planned == 20


@pytest.mark.parametrize("line", ["sampels: grid", "pretrain: {batch: 3}", "rungs: [{at: 3h, keep: below 6, and: 1}]"])
def test_an_unknown_key_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(f"space: {{seed: [1, 2]}}\n{line}\n")
    with pytest.raises(UserError):
        load(path)


def test_a_folder_is_continued_by_the_same_search_alone(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    claim_folder(folder, load(file))
    claim_folder(folder, load(file))
    claim_folder(folder, load(folder / "config.yaml"))
    with pytest.raises(UserError, match="seed: 42 there, 1 now"):
        claim_folder(folder, load(file, "--seed", "1"))


RANGE = {"optimizer.learning_rate": Range(1e-4, 1e-2)}
RANDOM = {"sampler": "random", "num_runs": 4}
STEPS = dict.fromkeys(["validation_interval", "checkpoint_interval"], "10%") | {
    "time_budget": None,
    "max_steps": 9,
    "early_validation_interval": None,
}


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({}, {}, "space is empty"),
        ({"seed": []}, {}, "space: seed has no values"),
        ({"seed": [1, 2, 1]}, {}, "space: seed has 1 twice"),
        ({"gradient_clipping": [1, 1.0]}, {}, "space: gradient_clipping has 1 twice"),
        ({"learning_rate": [1e-3]}, {}, "no option learning_rate; the nearest is optimizer.learning_rate"),
        ({"train_batch": [64]}, {}, "no option train_batch; the nearest is train_batch_size"),
        ({"model": [1]}, {}, "no option model"),
        ({1: [1]}, {}, "no option 1"),
        ({"time_budget": ["1h", "2h"]}, {}, "time_budget cannot vary"),
        ({"max_steps": [10, 20]}, {}, "max_steps cannot vary"),
        ({"resume": ["never"]}, {}, "resume cannot vary"),
        ({"pause_at": ["1h"]}, {}, "(pause_at cannot vary|no option pause_at)"),
        ({"early_stop": ["24hbert"]}, {}, "early_stop cannot vary"),
        ({"init_from": [None, "bert"], "model.preset": ["bert-base"]}, {}, "model.preset cannot vary where init_from"),
        ({"train_batch_size": [64.0]}, {}, "space: train_batch_size takes no 64.0"),
        ({"train_batch_size": [True]}, {}, "space: train_batch_size takes no True"),
        ({"train_batch_size": [None]}, {}, "space: train_batch_size takes no None"),
        ({"optimizer.learning_rate": ["high"]}, {}, "space: optimizer.learning_rate takes no 'high'"),
        ({"model.preset": ["bert-huge"]}, {}, "space: model.preset takes no 'bert-huge'"),
        (RANGE, {}, "optimizer.learning_rate is a range, which a grid cannot try"),
        ({"seed": Range(1, 1)}, RANDOM, "seed: low 1 must be below high 1"),
        ({"gradient_clipping": Range(0.0, float("nan"))}, RANDOM, "must be below high nan"),
        ({"seed": Range(0.5, 2)}, RANDOM, "seed takes whole numbers"),
        ({"gradient_clipping": Range(0.0, 1.0, log=True)}, RANDOM, "low 0.0 must be above 0 for log"),
        ({"schedule": Range(0, 1)}, RANDOM, "schedule takes no numbers"),
        ({"warmup_proportion": [0.1, 1.5]}, {}, "space: warmup_proportion 1.5: warmup_proportion 1.5 is not a share"),
        ({"warmup_proportion": [0.1, 1.5]}, {"sampler": "random", "num_runs": 1}, "space: warmup_proportion 1.5"),
        ({"optimizer.learning_rate": Range(0.0, 1e-2)}, RANDOM, "optimizer.learning_rate 0.0: .*above 0"),
        ({"seed": [1, 2], "schedule_length": ["3d", "1h"]}, {}, "space: seed 1, schedule_length 1h: .*shorter"),
        ({"train_batch_size": [64, 100]}, {"gpus_per_run": 8}, "space: train_batch_size 100: .*divisible by 8"),
        (LEARNING_RATES, {"gpus_per_run": 0}, "gpus_per_run must be at least 1"),
        (LEARNING_RATES, {"sampler": "tpe"}, "sampler tpe needs num_runs"),
        (LEARNING_RATES, {"sampler": "tpe", "num_runs": 0}, "num_runs must be at least 1"),
        (LEARNING_RATES, {"sampler": "random", "num_runs": 3}, "num_runs 3 is more than the 2 combinations"),
        (LEARNING_RATES, {"num_runs": 2}, "num_runs is for random and tpe"),
        (LEARNING_RATES, {"rungs": [Rung("24h", "below 6")]}, "rung at 24h: 24h is not before the end of the run"),
        (LEARNING_RATES, {"rungs": [Rung("100%", "below 6")]}, "rung at 100%: 100% is not before the end"),
        (LEARNING_RATES, {"rungs": [Rung("12h", "below 6"), Rung("50%", "top 50 %")]}, "another rung is at the same"),
        (LEARNING_RATES, {"rungs": [Rung("12h", "below 6")], "hyperband": Hyperband()}, "either rungs or hyperband"),
        (LEARNING_RATES, {"hyperband": Hyperband("2d")}, "hyperband: first: 2d is not before the end"),
        (LEARNING_RATES, {"hyperband": Hyperband("soon")}, "hyperband: first: 'soon' is not a duration"),
        (LEARNING_RATES, {"hyperband": Hyperband(reduction_factor=1)}, "reduction_factor must be at least 2"),
        (LEARNING_RATES, {"pretrain": {"early_stop": "24hbert"}}, "pretrain.early_stop: .*rungs"),
        (LEARNING_RATES, {"pretrain": {"resume": "never"}}, "pretrain.resume must be auto"),
        ({"model.hidden_size": [64]}, {"pretrain": {"init_from": "bert"}}, "model.hidden_size cannot vary where"),
        (LEARNING_RATES, {"pretrain": STEPS, "rungs": [Rung("3h", "below 6")]}, "rung at 3h: .*max_steps"),
        (LEARNING_RATES, {"storage": "postgresql://me:secret@host/db"}, "storage holds a password"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(space: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        search(space, **options)
    assert "\n" not in str(refusal.value)


def test_dropout_may_vary_where_init_from_gives_the_sizes() -> None:
    search({"model.hidden_dropout_prob": [0.0, 0.1]}, {"init_from": "bert-base-uncased"})
