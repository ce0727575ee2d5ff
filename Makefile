# Two commands do everything on a fresh machine that has Python 3.11+, a C++ compiler and make:
#   make demo   installs brim and streams an answer from the embedded model
#   make test   installs what the tests need and runs every check
# All paths are relative, so that a checkout below a directory with a space in its name works too.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types imports unit lock clean bench bench-overhead bench-cpu \
  bench-busy bench-first bench-many bench-death bench-equality bench-footprint bench-forecast \
  bench-mlx bench-mlx-memory bench-kv bench-engines bench-serving bench-overflow fuzz \
  bench-pressure bench-steps bench-relief bench-switching bench-cycles bench-priorities bench-meter fuzz-server \
  goldens forecast-fit forecast-pages catalogue

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
	$(PY) -m brim run --temp 0 "Return the absolute path of a file." </dev/null

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

# Benches are not tests: they compare within one run, on a quiet machine (docs/benchmarks.md).
bench: bench-first bench-many bench-death bench-cpu bench-overhead bench-busy bench-equality  ## all benches

bench-overhead: $(VENV)/.dev  ## one stream through HTTP against a bare llama.cpp loop (makes a stand-in first)
	$(PY) benches/make_standin.py
	$(PY) benches/overhead.py

bench-cpu: $(VENV)/.dev  ## CPU time per token outside the engine, worker and gateway
	$(PY) benches/cpu_per_token.py demo

bench-busy: $(VENV)/.dev  ## decode beside a busy process on every core
	$(PY) benches/make_standin.py
	$(PY) benches/contention.py

bench-first: $(VENV)/.dev  ## process start to first token
	$(PY) benches/first_token.py

bench-serving: $(VENV)/.dev  ## servers side by side, all workloads; LLAMA_SERVER=path of a llama-server
	$(PY) benches/make_standin.py
	$(PY) benches/against_llama_server.py --llama-server "$(LLAMA_SERVER)"

bench-overflow: $(VENV)/.dev  ## what each overflow policy costs over a long conversation
	$(PY) benches/overflow_cost.py

bench-many: $(VENV)/.dev  ## 64 streaming clients at once
	$(PY) benches/concurrency.py

bench-death: $(VENV)/.dev  ## kill -9 of the worker during eight streams
	$(PY) benches/worker_death.py

bench-pressure: $(VENV)/.dev  ## three models, real memory pressure: governor on and off (root, a memory cgroup, swap)
	$(PY) benches/pressure.py

bench-steps: $(VENV)/.dev  ## what idle cells and other sequences cost a step of llama.cpp on a CPU
	$(PY) benches/make_standin.py
	$(PY) benches/step_costs.py

bench-relief: $(VENV)/.dev  ## from an event of pressure to memory given back
	$(PY) benches/pressure_relief.py

bench-switching: $(VENV)/.dev  ## a hundred requests for four models of which two fit
	$(PY) benches/switching.py

bench-cycles: $(VENV)/.dev  ## 500 loads and unloads: what is left over
	$(PY) benches/load_cycles.py

bench-priorities: $(VENV)/.dev  ## an interactive app beside a background app that floods
	$(PY) benches/priorities.py

bench-meter: $(VENV)/.dev  ## what counting an app's usage costs a request
	$(PY) benches/meter_cost.py

bench-equality: $(VENV)/.dev  ## tokens and logits against a plain llama_decode loop, and of MLX against llama.cpp
	$(PY) benches/equality.py --profile exact src/brim/registry/data/demo.gguf
	$(PY) benches/equality.py --profile shipping src/brim/registry/data/demo.gguf
	$(PY) benches/equality.py --profile shipping tests/models/pystd-1m

bench-footprint: $(VENV)/.dev  ## planned against measured memory of six stand-ins (needs 4 GB of disk)
	$(PY) benches/footprint.py

bench-forecast: $(VENV)/.dev  ## planned against measured speed, after: brim calibrate
	$(PY) benches/forecast_speed.py

bench-mlx: $(VENV)/.dev  ## MLX: brim against mlx-lm's BatchGenerator and stream_generate
	$(PY) benches/make_standin.py --quant "MLX bf16"
	$(PY) benches/mlx_throughput.py

bench-mlx-memory: $(VENV)/.dev  ## MLX: planned against measured memory, load peaks included
	$(PY) benches/mlx_memory.py

bench-kv: $(VENV)/.dev  ## what 8-bit and 4-bit KV changes in what a model says
	$(PY) benches/kv_quality.py

# A CPU takes minutes for more; on a Mac measure a model of your own, deeper and longer.
bench-engines: $(VENV)/.dev  ## MLX and llama.cpp on one model in turns
	model="$$($(PY) benches/make_standin.py --quant 'MLX bf16')" && \
	  $(PY) -m brim bench speed -m "$$model" --engine both -p 64 -n 16 -d 0,256 -b 1,8 -r 3

fuzz: $(VENV)/.dev  ## 100,000 mutated headers within 256 MB; header speed of a 40 GB file
	$(PY) benches/fuzz_headers.py --count 100000
	$(PY) benches/header_speed.py

fuzz-server: $(VENV)/.dev  ## ten minutes of broken requests against every route of a running server
	$(PY) benches/fuzz_server.py

goldens: $(VENV)/.dev  ## write tests/golden anew: plans, events of scenarios; the diff is what a change does
	PYTHONPATH=tests $(PY) tests/golden/golden_plans.py
	PYTHONPATH=tests $(PY) tests/golden/golden_scenarios.py

# ROWS is a JSON file of measured speeds, PROMISES one of published expectations; neither ships.
forecast-fit: $(VENV)/.dev  ## fit the speed table of planner/data: make forecast-fit ROWS=FILE
	$(PY) benches/fit_apple_speeds.py "$(ROWS)"

forecast-pages: $(VENV)/.dev  ## write docs/forecast.md and docs/expectations.md: make forecast-pages ROWS=FILE PROMISES=FILE
	$(PY) benches/forecast_pages.py "$(ROWS)" "$(PROMISES)"

catalogue: $(VENV)/.dev  ## check the catalogue's configs against published parameter counts
	$(PY) benches/check_catalogue.py

lock: $(VENV)/.dev  ## pin the dependencies of pyproject.toml again (needs uv)
	uv pip compile -q pyproject.toml requirements/build.in --universal --generate-hashes \
	  --no-annotate --no-header --python-version 3.11 -o requirements/runtime.txt
	uv pip compile -q pyproject.toml requirements/build.in --group dev -c requirements/runtime.txt --universal \
	  --generate-hashes --no-annotate --no-header --python-version 3.11 -o requirements/dev.txt

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
