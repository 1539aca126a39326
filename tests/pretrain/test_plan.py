"""A plan's arithmetic against the real clock's rules and published speeds, and one plan by a real trial."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from data_prep.shards import RowSizes, read_manifest
from pretrain.__main__ import COMMANDS
from pretrain.architecture import PRESETS, ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, Workload, shape_of_micro_batches
from pretrain.budget import Budget, Cadence
from pretrain.candidates import candidates_of
from pretrain.config import PretrainConfig
from pretrain.data_sample import DataSample, emptiness, sample_data
from pretrain.director import Director
from pretrain.forecast import Course, Durations, Estimate, Forecast, marks_of, predict, run_out
from pretrain.hardware import GPUS, computed_estimate, first_that_fits
from pretrain.plan import TOKENS_A_PARAMETER, Row, recommend
from pretrain.run_record import read_metrics
from pretrain.trial_run import Trial, last_word, trial_config

DURATIONS = Durations(
    launch=5,
    starting=2.0,
    micro_batch_search=0.5,
    first_step=4.0,
    step=0.25,
    first_validation=3.0,
    validation=2.0,
    checkpoint=1.5,
    export=1.0,
    closing=6,
)
SHARES = "--validation_interval 10% --early_validation_interval null --checkpoint_interval 10%"
TINY = PretrainConfig(
    model=ModelConfig(preset="bert-tiny", hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    time_budget="60s",
    train_batch_size=24,
    micro_batch_size=4,
    validation_interval="20%",
    early_validation_interval=None,
    checkpoint_interval="20%",
)


def simulate(seconds: float, durations: Durations, cadences: list[Cadence], exports: list[float]) -> Course:
    """The run's own Budget and Director, one step at a time, on a clock that jumps."""
    now = [0.0]
    budget = Budget(seconds, None, clock=lambda: now[0])
    marks = dict(enumerate(exports, 1))
    director = Director(budget, *cadences, marks, lambda: None, lambda *values: [float(v) for v in values], rank=0)
    counts = {"validate": 0, "save": 0, "export": 0}
    budget.start(0)
    now[0] += durations.starting + durations.micro_batch_search
    step = 0

    def act(action: str, taken: float) -> None:
        now[0] += taken
        counts[action] += 1
        director.record(action, taken)

    while not (decision := director.decide(step)).stopped_by:
        taken = durations.step if step else durations.first_step
        now[0] += taken
        step += 1
        budget.record_step(taken)
        if decision.validate:
            act("validate", durations.validation if counts["validate"] else durations.first_validation)
        if decision.save:
            act("save", durations.checkpoint)
        if decision.export:
            act("export", durations.checkpoint + durations.export)
    saved = counts["save"] + counts["export"]
    return Course(step, counts["validate"], saved, counts["export"], now[0])


@pytest.mark.parametrize("seed", range(25))
def test_the_course_is_that_of_the_runs_own_budget_and_director(seed: int) -> None:
    random = np.random.default_rng(seed)
    seconds = float(random.uniform(100, 3000))
    durations = replace(
        DURATIONS,
        step=float(random.uniform(0.02, 2.0)),
        first_step=float(random.uniform(2, 20)),
        validation=float(random.uniform(0.1, 6)),
        checkpoint=float(random.uniform(0.1, 3)),
    )
    intervals = [float(interval) for interval in random.choice([0.03, 0.1, 0.2, 0.3, 1.0], 2)]
    early = float(random.choice([0.01, 0.02])), 0.05
    exports = [0.25, 0.5] if seed % 2 else []

    def cadences() -> list[Cadence]:
        return [Cadence(intervals[0], *early), Cadence(intervals[1])]

    expected = simulate(seconds, durations, cadences(), exports)
    course = run_out(seconds, durations, *map(marks_of, cadences()), exports)
    assert abs(course.steps - expected.steps) <= 2 + 0.002 * expected.steps
    assert course.elapsed_seconds == pytest.approx(expected.elapsed_seconds, abs=2 * durations.step + 0.1)
    for count in ("validations", "checkpoints", "exports"):
        assert abs(getattr(course, count) - getattr(expected, count)) <= 1, count
    assert course.elapsed_seconds <= seconds


def test_marks_are_those_of_the_cadence() -> None:
    assert marks_of(Cadence(0.25)) == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-6)
    day = marks_of(Cadence(1 / 48, 1 / 144, 0.05))  # every 10 minutes in the first 72, then every 30
    assert day[:8] == pytest.approx([*(n / 144 for n in range(1, 8)), 0.05 + 1 / 48], abs=1e-6)


def test_a_budget_that_ends_before_the_first_step_buys_none() -> None:
    assert run_out(2.0, DURATIONS, [], [], []).steps == 0


def sample_of(length: int, predictions: int) -> DataSample:
    sizes = RowSizes(np.array([length]), np.array([predictions]))
    return DataSample(train_rows=1_000_000, validation_rows=1000, dupe_factor=10, workload=Workload.of(sizes))


@pytest.mark.parametrize(
    ("gpu", "utilisation", "sequences_per_second"),
    [("titan-v", 0.30, 136), ("a100-80", 0.45, 580)],  # 24hBERT's Table 1; NVIDIA DeepLearningExamples, phase 1
)
def test_described_gpus_are_as_fast_as_published(gpu: str, utilisation: float, sequences_per_second: float) -> None:
    architecture = resolve(ModelConfig(preset="bert-large"), vocab_size=30522, max_seq_length=128, pad_token_id=0)
    plan = BatchPlan(4096, 32, world_size=8)
    estimate = computed_estimate(GPUS[gpu], utilisation, architecture, sample_of(128, 20), plan, idle_share=0.0)
    assert 4096 / 8 / estimate.durations.step == pytest.approx(sequences_per_second, rel=0.05)


def test_24hberts_micro_batch_of_32_fits_its_gpu_by_the_arithmetic() -> None:
    architecture = resolve(ModelConfig(preset="bert-large"), vocab_size=30522, max_seq_length=128, pad_token_id=0)
    assert architecture.num_parameters == pytest.approx(335e6, rel=0.01)
    wikipedia = sample_of(97, 15)  # the mean over its rows
    assert first_that_fits(GPUS["titan-v"], architecture, wikipedia, [256, 128, 64, 32, 16], 8) == 32
    with pytest.raises(UserError, match="out of memory by the arithmetic"):
        first_that_fits(GPUS["titan-v"], architecture, sample_of(128, 20), [512], 8)


def forecast_of(tokens_per_parameter: float, steps: int) -> Forecast:
    estimate = Estimate(DURATIONS, 4, 1e9, 1e6, 1e6, 100.0, timed_steps=100)
    told = predict(TINY, estimate, sample_of(64, 8), 1_000_000, 0.1, 2, None)
    return replace(told, tokens_per_parameter=tokens_per_parameter, course=replace(told.course, steps=steps))


def row(model: str, parameters: int, batch: int, tokens_per_parameter: float, steps: int) -> Row:
    return Row(model, batch, "", parameters, (forecast_of(tokens_per_parameter, steps),))


def test_the_rule_takes_the_largest_model_with_enough_tokens_and_the_batch_nearest_to_24hberts_steps() -> None:
    rows = [
        row("small", 10, 64, 900, 90_000),
        row("middle", 20, 64, 130, 50_000),
        row("middle", 20, 128, 130, 25_000),
        row("middle", 20, 256, 131, 12_000),
        row("large", 30, 64, TOKENS_A_PARAMETER / 3, 10_000),
        Row("huge", 64, "", 40, failure="out of memory"),
    ]
    recommendation = recommend(rows)
    assert recommendation.row is rows[2]
    assert recommendation.close == []
    assert recommend([*rows[:4], row("large", 30, 64, TOKENS_A_PARAMETER / 1.5, 10_000)]).close == ["large"]


def test_without_enough_tokens_the_smallest_model_comes_nearest() -> None:
    rows = [row("small", 10, 64, 9, 1000), row("large", 30, 64, 1, 300)]
    assert recommend(rows).row is rows[0]
    with pytest.raises(UserError, match="out of memory"):
        recommend([Row("huge", 64, "", 40, failure="out of memory")])


def test_a_forecast_adds_up() -> None:
    estimate = Estimate(DURATIONS, 4, 1e9, checkpoint_bytes=50e6, model_bytes=20e6, log_line_bytes=0.0)
    config = replace(TINY, time_budget="10m", export_at=[0.5])
    told = predict(config, estimate, sample_of(100, 15), 1_000_000, 0.1, num_gpus=2, price_per_gpu_hour=3.0)
    assert told.sequences == told.course.steps * 24
    assert told.tokens == told.sequences * 100
    assert told.epochs == told.sequences / 1_000_000
    assert told.text_passes == 10 * told.epochs
    assert told.disk_bytes == 2 * 50e6 + 2 * 20e6
    assert told.peak_disk_bytes == told.disk_bytes + 50e6
    assert told.wall_seconds == pytest.approx(5 + 600 + 6, abs=1)
    assert told.cost == pytest.approx(told.wall_seconds / 3600 * 2 * 3.0)


def test_the_options_of_a_candidate_make_its_configuration(tmp_path) -> None:
    config = replace(TINY, micro_batch_size="auto")
    for candidate in candidates_of(config, list(PRESETS), [24, 48]):
        arguments = "--model.preset bert-tiny --model.hidden_size 32 --time_budget 60s --early_validation_interval null"
        arguments += " --model.hidden_dropout_prob 0 --model.attention_probs_dropout_prob 0 --validation_interval 20%"
        arguments += f" --checkpoint_interval 20% {candidate.options}"
        parser = config_parser("test", "", PretrainConfig)
        assert take_config(parse(parser, arguments.split()), PretrainConfig) == candidate.config
    assert [c.model for c in candidates_of(config, None, [24])] == ["bert-tiny as set", "bert-mini"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_emptiness_is_that_of_the_batches_that_training_makes(world_size: int, data_dir: Path) -> None:
    manifest = read_manifest(data_dir)
    plan = BatchPlan(48, 8, world_size)
    shape = shape_of_micro_batches(manifest, plan)
    computed, waited, real = 0, 0, 0
    ranks = [
        TrainingBatches(manifest, plan, shape, rank, torch.device("cpu"), seed=0, sequences_seen=0)
        for rank in range(world_size)
    ]
    for _ in range(sample_data(manifest).train_rows // 48):
        batches = [rank.next_batch() for rank in ranks]
        counts = [len(batch.micro_batches) for batch in batches]
        computed += sum(counts) * shape.slots
        waited += world_size * max(counts) * shape.slots
        real += batches[0].workload.tokens
    for rank in ranks:
        rank.close()
    told = emptiness(manifest, plan)
    assert told.padding == pytest.approx(1 - real / computed, abs=1e-9)
    assert told.idle == pytest.approx(1 - real / waited, abs=1e-9)


def test_a_sample_knows_rows_copies_and_lengths(data_dir: Path) -> None:
    manifest = read_manifest(data_dir)
    sample = sample_data(manifest)
    assert sample.dupe_factor == 5
    assert sample.train_rows == sum(shard.rows for shard in manifest.of_split("train"))
    padded = 1 - sample.tokens_per_sequence / manifest.max_seq_length
    assert padded == pytest.approx(manifest.content["padding_share"], abs=0.03)


def test_a_trial_is_the_beginning_of_the_run_and_foretells_itself(data_dir: Path, tmp_path: Path) -> None:
    """What the trial's parts take, spent again over the trial's own budget, gives the trial's own steps."""
    estimate = Trial(TINY, data_dir, num_processes=2, seconds=4.0).run(tmp_path / "trial")
    folder = max((path for path in (tmp_path / "trial").iterdir() if path.is_dir()), key=lambda path: path.name)
    summary = json.loads((folder / "summary.json").read_text())
    own = replace(trial_config(TINY, summary["time_budget_seconds"]), micro_batch_size=4)
    told = predict(own, estimate, sample_data(read_manifest(data_dir)), 1_000_000, 0.1, 2, None)
    assert told.course.steps == pytest.approx(summary["steps"], rel=0.15, abs=5)
    assert estimate.timed_steps == summary["steps"] - 1
    assert estimate.checkpoint_bytes > 3 * 4 * 50_000
    first = next(event for event in read_metrics(folder) if event["event"] == "train")
    assert math.isfinite(first["loss"])


def test_a_trial_that_start_and_compilation_use_up_is_made_again_longer(monkeypatch, tmp_path: Path) -> None:
    asked = []

    def run(self: Trial, folder: Path) -> Estimate:
        asked.append(self.seconds)
        return Estimate(DURATIONS, 4, 1e9, 1e6, 1e6, 100.0, timed_steps=20 if len(asked) == 2 else 0)

    monkeypatch.setattr(Trial, "_run", run)
    trial = Trial(TINY, tmp_path, num_processes=1, seconds=5.0)
    assert trial.run(tmp_path).timed_steps == 20
    assert asked == [5.0, 5.0 + 2 * (2.0 + 0.5 + 4.0)]
    with pytest.raises(UserError, match="longer --trial_seconds"):
        trial.run(tmp_path)


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        (
            "noise\nerror: out of memory with micro_batch_size 8: 4 fits\nmore",
            1,
            "out of memory with micro_batch_size 8: 4 fits",
        ),
        ("[rank1]: Traceback ...\n[rank1]: RuntimeError: NCCL is ill\n", 1, "RuntimeError: NCCL is ill"),
        ("  exitcode  : -9 (pid: 12)\n", 1, "killed from outside"),
        ("", 3, "ended with code 3 and no word"),
    ],
)
def test_the_last_word_of_a_failure(output: str, code: int, reason: str) -> None:
    assert last_word(output, code).startswith(reason)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data_dir nowhere", "data folder nowhere does not exist"),
        ("--gpu gtx-4", "gpu 'gtx-4' is not in the table: it has titan-v, v100"),
        ("--presets bert-huge", "there is no preset 'bert-huge': there are bert-tiny"),
        ("--train_batch_sizes many", "train_batch_sizes 'many' is not a list of numbers"),
        ("--train_batch_sizes 0", "train_batch_size must be at least 1"),
        ("--num_gpus 0", "num_gpus must be above 0"),
        ("--trial_seconds 40 --time_budget 60s", "too short for 4 trials"),
        ("--time_budget 3s", "too short for 4 trials"),
        (f"--time_budget null --max_steps 10 {SHARES}", "a plan is for a time_budget"),
        ("--gpu h200 --train_batch_size 10 --num_gpus 8", "train_batch_size 10 is not divisible by 8 processes"),
        ("--num_gpus 1 --presets bert-tiny --train_batch_sizes 8 --kernels apex", "kernels apex need an NVIDIA GPU"),
    ],
)
def test_bad_input_ends_in_one_line(options: str, words: str, data_dir: Path) -> None:
    arguments = ["--data_dir", str(data_dir), "--model.preset", "bert-tiny", "--time_budget", "2m", *options.split()]
    with pytest.raises(UserError) as error:
        COMMANDS["plan"](arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_for_another_machine_is_labelled_as_computed_and_kept(data_dir: Path, tmp_path: Path, capsys) -> None:
    options = "--gpu H200 --num_gpus 8 --price_per_gpu_hour 3 --presets bert-base,bert-large --output_dir".split()
    COMMANDS["plan"](["--data_dir", str(data_dir), *options, str(tmp_path / "plan")])
    printed = capsys.readouterr().out
    assert "Computed, not measured" in printed
    assert "rule of thumb, not a measurement" in printed
    assert (tmp_path / "plan" / "plan.md").read_text() == printed
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [(row["model"], row["train_batch_size"]) for row in plan["rows"]] == [
        ("bert-base", 4096),
        ("bert-base", 8192),
        ("bert-large", 4096),
        ("bert-large", 8192),
    ]
    modest, good = plan["rows"][0]["forecasts"]
    assert modest["course"]["steps"] < good["course"]["steps"]
