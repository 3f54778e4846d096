# make demo   creates the environment, installs, gets the default model, runs the main job
# make test   does its own set-up and runs linters, type checks and tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A machine without an NVIDIA driver takes torch's CPU build, which pulls no CUDA.
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: demo test lint types unit bench setup clean help

help:
	@sed -n '1,2p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" GPU="$(GPU)" sh scripts/install.sh
	@touch $(STAMP)

demo: setup
	$(BIN)/python -m workbench fetch smollm2-135m-instruct
	$(BIN)/python -m workbench +technique=spec_decode +experiment=demo

test: setup lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m workbench fetch smollm2-135m-instruct
	$(BIN)/python -m pytest --benchmark-skip -n 2 --dist loadfile

bench: setup
	$(BIN)/python -m workbench fetch smollm2-135m-instruct
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

clean:
	rm -rf $(VENV) build *.egg-info
