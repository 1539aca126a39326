"""The parts of the GPU benchmark, the most important first, each of which adds its figures to one record."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks import fp16_overflow, steps_agree
from benchmarks.gpu_details import data_wait, longest_kernels, memory_of_heads
from benchmarks.gpu_run import BudgetedRun, build_demo_data, run_config
from benchmarks.gpu_sides import (
    BARE,
    BARE_EAGER,
    HUGGING_FACE,
    HUGGING_FACE_EAGER,
    OURS,
    OURS_EAGER,
    OURS_ZERO1,
)
from benchmarks.gpu_speed import Bench, Cell, InTurns, by_micro_batch_size, fastest_micro_batch_size
from benchmarks.gpu_timing import release_memory
from common.errors import UserError
from data_prep.shards import Manifest, read_manifest
from pretrain.architecture import ModelConfig


@dataclass(frozen=True)
class Scale:
    """How large everything is that is measured."""

    models: dict[str, ModelConfig]
    checked: ModelConfig
    """Whose gradients are compared: kernels see widths, and not how many layers there are."""
    vocab_size: int
    max_seq_length: int
    max_predictions_per_seq: int
    train_batch_size: int
    micro_batch_sizes: tuple[int, ...]
    micro_batch_size: int
    """Where the best one has not been looked for."""
    rounds: int
    demo_megabytes: float
    run: dict[str, Any]


FULL_SCALE = Scale(
    models={"large": ModelConfig(preset="bert-large"), "base": ModelConfig(preset="bert-base")},
    checked=ModelConfig(preset="bert-large", num_hidden_layers=4),
    vocab_size=30522,
    max_seq_length=128,
    max_predictions_per_seq=20,
    train_batch_size=2048,
    micro_batch_sizes=(32, 64, 128, 256, 512),
    micro_batch_size=256,
    rounds=7,
    demo_megabytes=16,
    run=run_config("bert-base", None, train_batch_size=1024, seconds=180),
)
SELF_CHECK = Scale(
    models={
        "large": ModelConfig(preset="bert-tiny", hidden_size=32),
        "base": ModelConfig(preset="bert-tiny", hidden_size=32, num_hidden_layers=1),
    },
    checked=ModelConfig(preset="bert-tiny", hidden_size=32),
    vocab_size=300,
    max_seq_length=32,
    max_predictions_per_seq=5,
    train_batch_size=16,
    micro_batch_sizes=(4, 8),
    micro_batch_size=8,
    rounds=2,
    demo_megabytes=0.1,
    run=run_config("bert-tiny", 32, train_batch_size=32, seconds=8),
)


class GpuBenchmark:
    """What is measured, and the record that it goes to.

    Args:
        scale: how large everything is.
        bench: what every measurement needs.
        data: a data folder; None: one is made of generated text where one is needed.
        folder: an empty one to work in.
        environment: of processes that are started, without anything that a launcher has set.
        glue: folder with CoLA/ and RTE/; None: the demo's tasks.
        glue_model: what is fine-tuned; None: the model of the section ``run``.
    """

    def __init__(
        self,
        scale: Scale,
        bench: Bench,
        data: Path | None,
        folder: Path,
        environment: Mapping[str, str],
        glue: Path | None,
        glue_model: Path | None,
    ) -> None:
        self._scale = scale
        self._bench = bench
        self._data = data
        self._folder = folder
        self._environment = environment
        self._glue = glue
        self._glue_model = glue_model
        self.figures: dict[str, Any] = {"checks": [], "speeds": [], "section_seconds": {}}

    def run(self, names: list[str]) -> dict[str, Any]:
        """Measure the sections of these names as far as there is time; returns the figures."""
        attempts = self._bench.attempts
        for name, section in SECTIONS.items():
            if name not in names:
                continue
            if not self._bench.clock.has_room_for(section.seconds):
                attempts.outcomes[name] = "no time left"
                continue
            started = time.monotonic()
            attempts.of(name, lambda: section.measure(self))  # noqa: B023
            release_memory(self._bench.hardware.device)
            self.figures["section_seconds"][name] = round(time.monotonic() - started, 1)
        self.figures["checks_failed"] = sum(not check["agrees"] for check in self.figures["checks"])
        self.figures["no_result"], self.figures["failures"] = attempts.outcomes, attempts.failures
        return self.figures

    def correctness(self) -> None:
        """Gradients in every way to compute them, and an overflow in fp16."""
        self.figures["checks"] += steps_agree(self._bench, self._scale.checked)
        self.figures["checks"].append(fp16_overflow(self._bench, self._scale.checked))

    def speed(self, size: str) -> None:
        """This project's step, Hugging Face's and a bare loop's, at the best micro-batch."""
        config = self._scale.models[size]
        best, records = fastest_micro_batch_size(self._bench, size, config)
        self.figures["speeds"] += records
        if best is None:
            return
        self.figures[f"micro_batch_size_{size}"] = best
        ours, packed, padded = (Cell(OURS, rows) for rows in ("full", "packed", "padded"))
        theirs, theirs_padded, bare = Cell(HUGGING_FACE, "full"), Cell(HUGGING_FACE, "padded"), Cell(BARE, "full")
        turns = InTurns(self._bench, size, config, best).run([ours, theirs, theirs_padded, packed, bare, padded])
        ratios = {
            "vs_hf_compiled": turns.speed_up(packed, over=theirs_padded),
            "vs_hf_compiled_full_rows": turns.speed_up(ours, over=theirs),
            "packed_vs_padded": turns.speed_up(packed, over=padded),
            "deepspeed_vs_bare": turns.speed_up(ours, over=bare),
        }
        self._keep(turns, size, ratios)
        for record in self.figures["speeds"]:
            if (record["model"], record["side"], record["rows"]) == (size, OURS.name, "full"):
                self.figures[f"sequences_per_second_{size}"] = record["sequences_per_second"]
                self.figures[f"flop_utilisation_{size}"] = record["flop_utilisation"]
                self.figures[f"first_step_seconds_{size}"] = record["first_step_seconds"]

    def engines(self, size: str) -> None:
        """DeepSpeed's stages and a bare loop, with and without the compiler."""
        ours, zero1, eager = (Cell(variant, "full") for variant in (OURS, OURS_ZERO1, OURS_EAGER))
        others = [Cell(variant, "full") for variant in (BARE, BARE_EAGER, HUGGING_FACE_EAGER)]
        turns = InTurns(self._bench, size, self._scale.models[size], self._micro_batch_size(size))
        turns.run([ours, zero1, eager, *others])
        ratios = {
            "zero1_vs_zero0": turns.speed_up(zero1, over=ours),
            "compiled_vs_eager": turns.speed_up(ours, over=eager),
        }
        self._keep(turns, size, ratios)

    def micro_batches(self, size: str) -> None:
        """The step of a run at every micro-batch size, compiled."""
        config = self._scale.models[size]
        self.figures["speeds"] += by_micro_batch_size(self._bench, size, config, Cell(OURS, "full"))

    def profile(self, size: str) -> None:
        """The longest kernels of a step."""
        config = self._scale.models[size]
        self.figures["longest_kernels"] = longest_kernels(self._bench, config, self._micro_batch_size(size))

    def heads(self, size: str) -> None:
        """Memory with the sparse and with a dense head."""
        self.figures |= memory_of_heads(self._bench, self._scale.models[size], self._micro_batch_size(size))

    def waiting(self, size: str) -> None:
        """The share of the time that a run's steps wait for data."""
        config = self._scale.models[size]
        self.figures |= data_wait(self._bench, config, self._micro_batch_size(size), self._manifest)

    def whole_run(self) -> None:
        """A budgeted run, killed and resumed."""
        folder = self._folder / "run"
        folder.mkdir()
        figures, checks = BudgetedRun(self._scale.run, self._manifest.folder, folder, self._environment).measure()
        self.figures |= figures
        self.figures["checks"] += checks

    def grid(self) -> None:
        """Fine-tuning, in a process of its own: trials an hour, and what the run's model scores."""
        model = self._glue_model or self._folder / "run" / "run" / "hf"
        if not importlib.util.find_spec("accelerate"):
            raise UserError("Hugging Face's Trainer needs the package accelerate: pip install accelerate")
        if not model.is_dir():
            raise UserError("no model to fine-tune: give --glue-model, or let the section 'run' make one")
        command = [sys.executable, "benchmarks/gpu_grid.py", "--model", str(model.resolve())]
        command += ["--glue", str(self._glue.resolve())] if self._glue else []
        command += ["--self-check"] if self._scale is SELF_CHECK else []
        options = {"cwd": Path(__file__).parent.parent, "env": self._environment, "stdout": subprocess.PIPE}
        done = subprocess.run(command, check=True, text=True, **options)
        self.figures |= json.loads(done.stdout.splitlines()[-1])

    def _keep(self, turns: InTurns, size: str, ratios: dict[str, float | None]) -> None:
        self.figures["speeds"] += turns.records()
        self.figures |= {f"{name}_{size}": ratio for name, ratio in ratios.items() if ratio is not None}
        turns.close()

    def _micro_batch_size(self, size: str) -> int:
        return self.figures.get(f"micro_batch_size_{size}", self._scale.micro_batch_size)

    @cached_property
    def _manifest(self) -> Manifest:
        if self._data:
            return read_manifest(self._data)
        scale, folder = self._scale, self._folder / "data"
        return read_manifest(build_demo_data(folder, scale.demo_megabytes, scale.max_seq_length, self._environment))


@dataclass(frozen=True)
class Section:
    """One of the parts."""

    seconds: float
    """That there should be left for it, guessed for one data-centre GPU: a compilation of BERT-large is a minute."""
    measure: Callable[[GpuBenchmark], None]


SECTIONS = {
    "correctness": Section(120, GpuBenchmark.correctness),
    "large": Section(240, lambda benchmark: benchmark.speed("large")),
    "base": Section(120, lambda benchmark: benchmark.speed("base")),
    "profile": Section(90, lambda benchmark: benchmark.profile("large")),
    "engines": Section(180, lambda benchmark: benchmark.engines("large")),
    "run": Section(480, GpuBenchmark.whole_run),
    "grid": Section(300, GpuBenchmark.grid),
    "waiting": Section(120, lambda benchmark: benchmark.waiting("large")),
    "heads": Section(20, lambda benchmark: benchmark.heads("large")),
    "micro_batches": Section(120, lambda benchmark: benchmark.micro_batches("large")),
    "engines_base": Section(120, lambda benchmark: benchmark.engines("base")),
}
