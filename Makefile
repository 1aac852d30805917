# Two commands do all the set-up: `make quickstart` and `make test`. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

# The first interpreter that runs and is of a version that pyproject.toml admits; `make PYTHON=...` names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

# Where PyTorch publishes its CPU builds; asked only where the configured index has none and the machine has no NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# More arguments: `make quickstart ARGS="steps=200"`, `make test PYTEST_ARGS="-k planner"`.
ARGS ?=
PYTEST_ARGS ?=

# Two processes: what starts Ray in one, all else in the other (tests/two_processes.py). One after another where there is
# one core, or by `make test PARALLEL=`.
PARALLEL ?= $(if $(filter-out 1,$(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)),-n 2)

# Nothing compiles at run time, and DeepSpeed must not try to at install time.
export DS_BUILD_OPS := 0

.PHONY: help quickstart test test-fast lint format types wheel gpu-bundle clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

quickstart: $(VENV)/.installed ## install, then train a text-to-image model from raw images and show its samples
	$(BIN)/python launch/quickstart.py $(ARGS)

test: $(VENV)/.installed-dev ## install, then lint, types and all tests; prints what is skipped and why
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -rs $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev ## the tests that take seconds
	$(BIN)/python -m pytest -rs $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff's rules and format, checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## ruff's format, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## mypy
	$(BIN)/mypy

wheel: $(VENV)/.installed-dev ## dist/*.whl, with configs/ and data_pipelines/ in it
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

gpu-bundle: $(VENV)/.installed-dev ## build/gpu: what a bare GPU machine needs for `nexus bench gpu` and the tests marked gpu
	@nexus_scale/bench/gpu_bundle.sh build/gpu $(BIN)/python

clean: ## forget the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# ---------------------------------------------------------------------------------------------------------- set-up
# Each stamp is older than the files that it follows from when these change, and then pip is asked again.

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# torch goes first, so that all that follows is satisfied by the build that fits the machine. DeepSpeed has no wheel, and
# its build looks at the torch that is there: hence the build tools and --no-build-isolation.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "installing build tools and torch $(TORCH)"
	@$(INSTALL) pip
	@$(INSTALL) setuptools wheel packaging ninja py-cpuinfo hatchling editables
	@if $(BIN)/python -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null; then \
	  echo "torch $(TORCH) is there"; \
	elif command -v nvidia-smi >/dev/null || [ "$$(uname -s)" != Linux ]; then \
	  $(INSTALL) "torch==$(TORCH)"; \
	else \
	  $(INSTALL) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || { echo "the configured index has no CPU build of torch; asking $(TORCH_CPU_INDEX)"; \
	       $(INSTALL) --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu"; } \
	  || { echo "no CPU build of torch there; installing the one for CUDA (some 3 GB)"; $(INSTALL) "torch==$(TORCH)"; }; \
	fi
	@touch $@

$(VENV)/.deepspeed: $(VENV)/.torch
	@echo "installing DeepSpeed (from source, without compiling its operators)"
	@DS_ACCELERATOR=cpu $(INSTALL) --no-build-isolation deepspeed
	@touch $@

$(VENV)/.installed: $(VENV)/.deepspeed pyproject.toml
	@echo "installing nexus_scale and what the quickstart needs"
	@$(INSTALL) --no-build-isolation --editable ".[quickstart]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(INSTALL) --no-build-isolation --editable ".[dev]"
	@$(INSTALL) --no-deps resemblyzer # its weights alone: nexus_scale/metrics/speaker.py says why
	@touch $@
