# Everything runs in .venv, which `make setup` makes; every target does its own set-up and can be repeated.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
SEED ?= 42
DATA ?= data

# One process a GPU; on a machine without one, two CPU processes.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PROCESSES ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
DEEPSPEED = $(BIN)/deepspeed --num_gpus $(PROCESSES)

.PHONY: setup demo real test test-slow lint bench-data bench-step bench-glue bench-budget bench-kills bench-gpu clean

setup: .venv/ready

# Hugging Face's Trainer, to compare with.
.venv/trainer: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,benchmarks]"
	@touch $@

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is older than Python 3.11: call make with PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The whole pipeline on the embedded default: a generated corpus and a synthetic benchmark, no network.
demo: setup
	$(BIN)/python -m data_prep build --config configs/data/demo.yaml --output_dir $(RUNS)/demo-$(SEED)/data \
	    --seed $(SEED) --sources '[{"kind": "demo", "seed": $(SEED)}]'
	$(BIN)/python -m data_prep demo_benchmark --output_dir $(RUNS)/demo-$(SEED)/benchmark --seed $(SEED)
	$(DEEPSPEED) run_pretraining.py --config configs/pretrain/demo.yaml --seed $(SEED) \
	    --data_dir $(RUNS)/demo-$(SEED)/data --output_dir $(RUNS)/demo-$(SEED)/pretrain
	$(BIN)/python run_glue_grid.py --config configs/glue/demo.yaml --model $(RUNS)/demo-$(SEED)/pretrain/hf \
	    --glue_dir $(RUNS)/demo-$(SEED)/benchmark --output_dir $(RUNS)/demo-$(SEED)/glue
	@echo "model:  $(RUNS)/demo-$(SEED)/pretrain/hf"
	@echo "report: $(RUNS)/demo-$(SEED)/glue/report.html"

# The same on real text and real GLUE tasks: DATA holds wikitext/, bert-base-uncased/vocab.txt and glue/.
real: setup
	$(BIN)/python -m data_prep build --config configs/data/wikitext.yaml --output_dir $(RUNS)/real/data \
	    --sources '[{"kind": "text", "path": "$(DATA)/wikitext/enwiki-2014-train.txt.gz"}]' \
	    --tokenizer $(DATA)/bert-base-uncased/vocab.txt
	$(DEEPSPEED) run_pretraining.py --config configs/pretrain/real.yaml \
	    --data_dir $(RUNS)/real/data --output_dir $(RUNS)/real/pretrain
	$(BIN)/python run_glue_grid.py --config configs/glue/real.yaml --model $(RUNS)/real/pretrain/hf \
	    --glue_dir $(DATA)/glue --output_dir $(RUNS)/real/glue
	@echo "model:  $(RUNS)/real/pretrain/hf"
	@echo "report: $(RUNS)/real/glue/report.html"

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# What is too long for every run.
test-slow: .venv/trainer
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Data preparation against its limits; DATA as above. Give it an idle machine.
bench-data: setup
	$(BIN)/python benchmarks/data_prep.py --data $(DATA)

# The training step against Hugging Face's on a CPU.
bench-step: setup
	$(BIN)/python benchmarks/pretrain_step.py --data $(DATA)

# Fine-tuning on a CPU against Hugging Face's Trainer (an hour; give it an idle machine). MODEL is a Hugging Face folder;
# without one there are speeds only.
bench-glue: .venv/trainer
	$(BIN)/python benchmarks/glue_trial.py --data $(DATA) $(if $(MODEL),--model $(MODEL))

# What the clock costs and how exactly runs end with it (half an hour); runs that are killed (ten minutes).
bench-budget: setup
	$(BIN)/python benchmarks/clock_cost.py
	$(BIN)/python benchmarks/deadline.py

bench-kills: setup
	$(BIN)/python benchmarks/kills.py

# Everything that only a GPU can show.
bench-gpu: .venv/trainer
	$(BIN)/python benchmarks/gpu.py --record

# The runs are yours: `make clean` leaves them.
clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
