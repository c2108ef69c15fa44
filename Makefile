# make demo    train a small model here, with and without SDFT (about eight minutes on two idle cores)
# make test    the tests
# make lint    ruff and pyright
# make clean   remove what these made
#
# Each makes its virtual environment in .venv when it is not there; afterwards that takes no time.
# PYTHON=python3.12 chooses another Python; ARGS="..." is handed on: make test ARGS="-k sdft".
# WORKERS=6 processes share the tests, forks of one, of one computing thread each, since about half of
# the time a test waits for a clock or a process; WORKERS=0 is this one alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 6

.PHONY: demo test lint setup clean

demo: $(VENV)/.demo
	$(BIN)/ow demo $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(VENV)/.dev

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing openweights[demo] into $(VENV): some minutes; about 1.6 GB, or 5.4 with CUDA: README.md"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing openweights[dev] into $(VENV): some minutes; about 1.7 GB, or 5.5 with CUDA: README.md"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(VENV)/.demo $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "openweights needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build trajectories.png
