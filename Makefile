# make quickstart    environment, tiny bases, real images, three stages, held-out questions
# make real          the same with SmolLM2-135M as the language model; about an hour
# make rehearsal     the true 7B with random weights: train, export, answer; 40 GB, 24 GiB, an hour
# make test          all tests (make test-fast leaves out those that train)
# make env-engines   vLLM and llama.cpp on the CPU (3.5 GB), for the tests that ask them what we export
# make check         lint, format, types, licences and advisories of what is installed
# make gpu-check     what must hold on a GPU before days are spent on one; tiny on the CPU
# make fuzz          100,000 mutated files and requests, then guided by branches; a few are in make test
PYTHON ?= python3
VENV ?= .venv
# Tests run in so many processes, a file in one of them; each may train, with about 2 GiB.
TEST_WORKERS ?= 2
BIN := $(VENV)/bin
# Two processes with two threads each would wait for each other on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env env-newest env-engines quickstart real rehearsal test test-fast gpu-check fuzz check advisories format license clean

help:
	@sed -n '1,8s/^# //p' Makefile

env: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The newest transformers beside the main environment, for the tests of what is exported.
env-newest: env
	$(BIN)/python -m tests.newest_transformers

# The engines beside it; tests that ask them are skipped where this was not made.
env-engines: env
	$(BIN)/python -m tests.engines

quickstart: env
	$(BIN)/python examples/quickstart/run.py --work-dir work_dirs/quickstart

real: env
	$(BIN)/python examples/real/run.py --work-dir work_dirs/real

rehearsal: env
	$(BIN)/python examples/rehearsal/run.py --work-dir work_dirs/rehearsal

test: env env-newest
	$(PYTEST)

test-fast: env env-newest
	$(PYTEST) -m "not slow"

gpu-check: env
	$(BIN)/python benchmarks/gpu_check.py

fuzz: env
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 100000
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.guided --seconds 30

check: env advisories
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without a network it says that advisories were not looked up.
advisories: env
	$(BIN)/python -m tests.dependencies

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The SPDX line of new files, which `make check` asks for.
license: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check reuse==6.2.0
	$(BIN)/ruff check . --select CPY001 --output-format json | $(BIN)/python -c \
	    'import json, sys; print(*{one["filename"] for one in json.load(sys.stdin)}, sep="\n")' | \
	    xargs -r -d '\n' $(BIN)/reuse annotate --license Apache-2.0 --template spdx

clean:
	rm -rf work_dirs build dist *.egg-info
