# make help lists the targets. Everything runs in .venv, which is created when it is first needed.
#   PYTHON=python3.12        another interpreter for the environment
#   LEMO_TORCH=...           another torch (scripts/environment.sh says what it may be)
#   LEMO_PYTHON=/usr/bin/python3   use this interpreter's environment as it is; nothing is installed

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
LEMO_PYTHON ?=
RUN := $(if $(LEMO_PYTHON),PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(LEMO_PYTHON),$(VENV)/bin/python)
READY := $(if $(LEMO_PYTHON),,$(STAMP))
# The embedded model is dequantised into this cache once.
export LEMO_CACHE ?= $(CURDIR)/.cache/lemo
export PYTHON

.PHONY: help demo test test-slow test-gpu lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt scripts/environment.sh
	@bash scripts/environment.sh $(VENV)
	@touch $@

demo: $(READY)  ## fine-tune the embedded model on Python's own library; 15 minutes on 2 CPU cores
	@n=1; while [ -e "runs/demo-$$n" ]; do n=$$((n + 1)); done; \
	$(RUN) -m lemo finetune --output "runs/demo-$$n" $(DEMO_ARGS); \
	echo "Open $(CURDIR)/runs/demo-$$n/report.html in a browser."

# One thread a process: the tests' models are tiny, and two processes share the cores.
test: $(READY)  ## the tests that CI runs, on the CPU
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(READY)  ## longer CPU checks, outside CI
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow $(PYTEST_ARGS)

test-gpu: $(READY)  ## kernels, parity tests and those marked gpu, on a CUDA device
	@LEMO_TEST_DEVICE=cuda $(RUN) -m pytest -m "gpu or not slow" tests/kernels tests/parity tests/gpu tests/unit/test_norms.py \
	$(PYTEST_ARGS)

lint: $(READY)  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(READY)  ## a small quality study on the CPU: what leaving tokens out does to the model
	@n=1; while [ -e "runs/bench-$$n" ]; do n=$$((n + 1)); done; \
	$(RUN) -m lemo bench quality --config benchmarks/quality/cpu.yaml --output "runs/bench-$$n" $(BENCH_ARGS)

clean:  ## remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
