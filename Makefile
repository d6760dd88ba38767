# `make demo` and `make test` first install their dependencies into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo

OLDEST := .venv-oldest

.PHONY: demo test test-slow test-instruction-sets test-oldest check docs format bench clean

demo: .venv/core
	rm -rf $(DEMO) $(DEMO)-images
	$(BIN)/vitrail train digits --out $(DEMO)
	$(BIN)/vitrail evaluate $(DEMO) digits
	$(BIN)/python scripts/sample_digits.py $(DEMO)-images
	$(BIN)/vitrail predict $(DEMO) $(DEMO)-images

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -m "slow and not gpu"

# The quick tests once for each instruction set of this CPU (AVX2, AVX512, ...), which differ in rounding.
test-instruction-sets: .venv/dev
	$(BIN)/python scripts/test_instruction_sets.py

# The quick tests with the lowest versions that pyproject.toml allows, in an environment of their own.
test-oldest: $(OLDEST)/dev
	$(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

check: .venv/dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in docs/_build/html: warnings are errors, and no network is needed. The notebooks are run.
docs: .venv/dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest -q tests/docs/test_notebooks.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv $(OLDEST) build *.egg-info src/*.egg-info

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitrail needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/core: .venv/python pyproject.toml constraints.txt
	@echo "installing PyTorch and others into .venv: about 1 GB, which takes some minutes"
	@$(PIP) -e .
	touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	@echo "installing PyTorch and the tools for development into .venv, which takes some minutes"
	@$(PIP) -e ".[dev]"
	touch $@ .venv/core

$(OLDEST)/dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	touch $@
