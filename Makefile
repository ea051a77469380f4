# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.10 or newer, 2 cores, a package registry.
PYTHON ?= python3
# The build of torch to install. The default is one for CPUs where the registry has one of that version.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench clean

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev,report]'
	@touch $@

demo: $(READY)  ## Turn SmolLM2-135M into a linear RNN, measure it, show it, export it
	PATH="$(abspath $(BIN)):$$PATH" bash training/demo.sh

test: $(READY)  ## Run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types
	$(BIN)/mypy

bench: $(READY)  ## Time the chunked attention and a whole model against what they replace
	$(BIN)/python eval/bench_linear_attention.py
	$(BIN)/python eval/bench_model.py --json .cache/bench_model.json

clean:  ## Remove the virtual environment and what the demo made
	rm -rf $(VENV) .cache logs
