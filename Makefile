# Two commands do everything on a fresh machine that has Python 3.11+, a C++ compiler and make:
#   make demo   installs brim and streams an answer from the embedded model
#   make test   installs what the tests need and runs every check
# All paths are relative, so that a checkout below a directory with a space in its name works too.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types imports unit lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brim needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Compiling llama-cpp-python takes about five minutes once; pip keeps the wheel for the next environment.
$(VENV)/.runtime: requirements/runtime.txt pyproject.toml | $(PY)
	@echo "installing brim (compiling llama.cpp takes about five minutes the first time)"
	$(PIP) install --quiet --require-hashes -r requirements/runtime.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(PIP) install --quiet --require-hashes -r requirements/dev.txt
	@touch $@

demo: $(VENV)/.runtime  ## install brim and stream an answer from the embedded model
	$(PY) -m brim run --seed 1 "Return the sum of the items of a list." </dev/null

test: check unit  ## run every check and every test

check: lint types imports  ## run every static check

lint: $(VENV)/.dev  ## formatting, lint rules and spelling
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m codespell_lib src tests benches docs README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md

format: $(VENV)/.dev  ## apply formatting and safe fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

types: $(VENV)/.dev  ## mypy --strict
	$(PY) -m mypy

imports: $(VENV)/.dev  ## the layers of ARCHITECTURE.md
	PYTHONPATH=src $(VENV)/bin/lint-imports

unit: $(VENV)/.dev  ## pytest: unit, property, contract and end-to-end
	$(PY) -m pytest

lock: $(VENV)/.dev  ## pin the dependencies of pyproject.toml again (needs uv)
	uv pip compile -q pyproject.toml requirements/build.in --universal --generate-hashes \
	  --no-annotate --no-header --python-version 3.11 -o requirements/runtime.txt
	uv pip compile -q pyproject.toml requirements/build.in --group dev -c requirements/runtime.txt --universal \
	  --generate-hashes --no-annotate --no-header --python-version 3.11 -o requirements/dev.txt

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
