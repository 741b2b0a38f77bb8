# Everything runs in a virtual environment, $(VENV), that the first target to need it sets up.
# Needed beforehand: Python 3.11 or newer, make, and a package index for pip.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
BENCHMARKS ?= $(sort $(wildcard tests/benchmarks/[a-z]*.py))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Stamps say what $(VENV) holds. They depend on what decides it, so a second call does nothing.
BASE := $(VENV)/.aioinfer-base
EXAMPLES := $(VENV)/.aioinfer-examples
DEV := $(VENV)/.aioinfer-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench gpu docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Variables: PYTHON=$(PYTHON), VENV=$(VENV), WORKERS=$(WORKERS) (test processes),'
	@echo '           ARGS (options of the demo or of each benchmark), PYTEST_ARGS.'
	@echo 'Example:   make demo ARGS="--actors 32 --threads"'

demo: $(EXAMPLES) ## serve a policy to 64 CartPole actors; options in ARGS
	$(BIN)/python examples/cartpole.py $(ARGS)

# Some of the tests start dozens of processes, which would all compile the modules that they import
# where the environment tells Python not to keep that.
test: export PYTHONDONTWRITEBYTECODE =
test: $(DEV) ## lint, build the docs, then run all tests
	$(MAKE) -j 2 lint docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS) tests

lint: $(DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV) ## run the benchmarks one after the other; options in ARGS
	@set -e; for script in $(BENCHMARKS); do \
		echo "== $$script"; $(BIN)/python "$$script" $(ARGS); \
	done

gpu: $(DEV) ## run the tests that need a GPU, then the benchmark of it; options in ARGS
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS) tests
	$(BIN)/python tests/benchmarks/accelerator.py --report docs/benchmarks/accelerator.txt $(ARGS)

# -E reads every page again: a warning of an unchanged page must fail the second build too.
docs: $(DEV) ## build the site into docs/_build/html, warnings are errors
	$(BIN)/sphinx-build -E -W --keep-going -n -b html docs docs/_build/html

clean: ## remove caches and built files, keep the virtual environment
	rm -rf docs/_build dist build plots *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find aioinfer tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, with the constraints, so that no other package brings a newer one.
$(BASE): constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo 'aioinfer needs Python 3.11 or newer, and there is no "$(PYTHON)" here.' >&2; \
		echo 'Name one, for example: make PYTHON=python3.12' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'aioinfer needs Python 3.11 or newer; "$(PYTHON)" is' "$$("$(PYTHON)" --version 2>&1)." >&2; \
		echo 'Name another one, for example: make PYTHON=python3.12' >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) install -c constraints.txt torch
	@touch $@

$(EXAMPLES): $(BASE) pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[examples]'
	@touch $@

$(DEV): $(BASE) pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[test,lint,docs]'
	@touch $@ $(EXAMPLES)
