# From a fresh clone, `make train` and `make test` do everything: environment, pinned dependencies, data, run.
#
#   make train                    fine-tune a tiny LLaMA on two ranks (or on all GPUs) with MoFaSGD: 5 minutes on two cores
#   make train OPTIMIZER=AdamW    the same run with AdamW
#   make train BACKEND=fsdp2      the same under FSDP2; or ddp, one (a single process), zero0 to zero3; zero2 by itself
#   make test                     the tests that need no GPU: without ranks, then on ranks
#   make test-fast                of them, those of the parts: minutes less, for between two commits
#   make test-slow, make test-gpu the others
#   make test-long                of the slow ones, the 2000 steps on two ranks
#   make lint                     what an editor would say: ruff, formatting, types, who may import whom
#   make docs                     the site, in out/site: docs/ and the docstrings, links checked
#   make verify-claim             AdamW and MoFaSGD in the paper's setting, measured and judged: needs a GPU of 80 GB
#   make clean                    remove the environment and all outputs
#
# PYTHON=python3.12 picks an interpreter. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch without CUDA,
# which spares a machine without a GPU several GB (pip alone takes the CUDA build wherever it finds one).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
OPTIMIZER ?= MoFaSGD
BACKEND ?= zero2
OUT ?= out
JOBS ?= 2
STAMP := $(VENV)/.installed

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ifeq ($(GPUS),0)
  RANKS ?= $(if $(filter one,$(BACKEND)),1,2)
  # One rank per share of the cores; DeepSpeed must be told, or it may take a CUDA build of torch for a GPU.
  export DS_ACCELERATOR := cpu
  export OMP_NUM_THREADS := $(shell n=$$(( $$(nproc) / $(RANKS) )); echo $$(( n > 0 ? n : 1 )))
else
  RANKS ?= $(GPUS)
endif
# The environment's own tools (deepspeed, ninja) come first; DeepSpeed looks ninja up by name.
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: help setup train test test-fast test-slow test-long test-gpu lint docs verify-claim clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

$(STAMP): install.sh setup.py pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash install.sh "$(VENV)"
	@touch "$@"

# The best of the rates in the table of configs/README.md, for each.
LEARNING_RATE_AdamW := 1e-3
LEARNING_RATE_MoFaSGD := 1e-3
NAME := $(shell echo "$(OPTIMIZER)" | tr '[:upper:]' '[:lower:]')

# DeepSpeed's JSON names the optimizer with its options; without one the command line does, and says the same.
FLAGS_MoFaSGD := --optimizer MoFaSGD --adam_beta2 0.95
FLAGS_AdamW := --optimizer AdamW
TORCHRUN := torchrun --standalone --nproc_per_node $(RANKS) launch/train.py
START_one := python launch/train.py $(FLAGS_$(OPTIMIZER))
START_ddp := $(TORCHRUN) $(FLAGS_$(OPTIMIZER))
START_fsdp2 := $(TORCHRUN) --fsdp $(FLAGS_$(OPTIMIZER))
START := $(or $(START_$(BACKEND)),deepspeed --log_level error --num_gpus $(RANKS) launch/train.py \
  --deepspeed configs/$(BACKEND)_$(NAME).json)
RUN := llama-tiny-$(NAME)$(if $(filter-out zero2,$(BACKEND)),-$(BACKEND))

train: $(STAMP)
	@python launch/make_corpus.py --output_dir "$(OUT)/data"
	HF_HUB_OFFLINE=1 $(START) \
	  --model_config configs/models/llama-tiny.json \
	  --train_file "$(OUT)/data/train.txt" --eval_file "$(OUT)/data/eval.txt" \
	  --max_length 256 --per_device_train_batch_size 8 --per_device_eval_batch_size 32 \
	  --max_steps 200 --learning_rate $(LEARNING_RATE_$(OPTIMIZER)) --lr_scheduler_type cosine --warmup_steps 10 \
	  --eval_on_start true --output_dir "$(OUT)/$(RUN)"

# Apart from the rest: where torchao is installed, transformers imports it into every process, which then prints warnings.
TORCHAO := $(VENV)/torchao
$(TORCHAO): $(STAMP)
	python -m pip install --quiet --no-deps --constraint constraints.txt --upgrade --target "$@" torchao
	rm -rf "$@/test"  # of its own tests, in the place of Python's
	@touch "$@"

test test-fast test-slow test-long test-gpu: $(TORCHAO)
test test-fast test-slow test-long test-gpu: export PYTHONPATH := $(abspath $(TORCHAO))

# DeepSpeed compiles an operator when it is first used: all that the tests use once an environment, before any of them
# and its time limit begin. Where that fails, the tests that need one say so.
OPERATORS := $(VENV)/torch_extensions/.compiled
$(OPERATORS): $(STAMP) tests/compile_operators.py
	@mkdir -p "$(@D)"
	@DS_ACCELERATOR=cpu python tests/compile_operators.py && touch "$@" || echo "DeepSpeed's operators were not compiled"

test test-slow test-long: $(OPERATORS)
test test-slow test-long: export TORCH_EXTENSIONS_DIR := $(abspath $(VENV)/torch_extensions)
$(OPERATORS): export TORCH_EXTENSIONS_DIR := $(abspath $(VENV)/torch_extensions)

# Tests that start ranks of their own fill the cores; the others use one, so two of their files run at once. Both
# halves run, whatever the first one says; stopped by hand, neither goes on.
test: $(STAMP)
	@trap 'exit 130' INT TERM; without=0; ranks=0; \
	python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/ranks || without=$$?; \
	python -m pytest tests/ranks || ranks=$$?; \
	say() { case $$2 in 0) echo "$$1: passed";; 5) echo "$$1: FAILED, no test was collected";; \
	        *) echo "$$1: FAILED, pytest exit $$2";; esac; }; \
	say "tests without ranks" $$without; say "tests on ranks" $$ranks; \
	[ $$without = 0 ] && [ $$ranks = 0 ]

test-fast: $(STAMP)
	python -m pytest --numprocesses $(JOBS) --dist loadfile tests/unit tests/extending

test-slow: $(STAMP)
	python -m pytest -m slow

test-long: $(STAMP)
	python -m pytest -m slow tests/ranks/test_long.py

test-gpu: $(STAMP)
	python -m pytest -m gpu

# All four run; the target fails if one of them does.
lint: $(STAMP)
	@failed=0; \
	ruff check . || failed=1; \
	ruff format --check . || failed=1; \
	mypy || failed=1; \
	lint-imports --no-cache || failed=1; \
	exit $$failed

# A venv of its own: neither the package nor torch is installed there, the docstrings are read and not imported.
DOCS := $(VENV)-docs
$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv "$(DOCS)"
	"$(DOCS)/bin/python" -m pip install --quiet --constraint constraints.txt \
	  mkdocs mkdocs-material mkdocstrings mkdocstrings-python ruff  # which formats signatures
	@touch "$@"

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 "$(DOCS)/bin/mkdocs" build --strict --quiet --site-dir "$(abspath $(OUT))/site"
	@echo "the site: $(OUT)/site/index.html"

verify-claim: $(STAMP)
	python profiling/verify_claim.py --output_dir "$(OUT)/claim"

clean:
	rm -rf "$(VENV)" "$(DOCS)" "$(OUT)" build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
