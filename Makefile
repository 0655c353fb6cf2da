# Two commands are the whole set-up: `make demo` and `make test`. Each makes .venv where it is missing, installs what
# it needs with the tested versions of constraints.txt, and installs nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a test process: two processes of two threads on two cores would wait for each other at every product.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: demo test test-long lint format clean

demo: $(VENV)/.installed
	$(BIN)/fastft demo

test: lint
	$(PYTEST) -m "not long"

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

# The book's own code, which its figures are tested against, asks for TensorFlow and Jupyter that the parts used here
# do not import: hence without its dependencies.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llms-from-scratch
	touch $@
