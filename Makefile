# The door. Each target sets up .venv first when it is missing or older than the pins.
SHELL := /bin/bash
PROFILE ?= mini
OVERLAY ?=
JOBS ?= $(shell OMP_NUM_THREADS= nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_INSTALL_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread per process: runs are side by side, and on one thread the same seed gives the same numbers.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export PYTHONHASHSEED := 0

# Contents and parameters decide what is out of date (not the text of a rule); one failed run stops no other.
SNAKEMAKE = $(BIN)/snakemake --cores $(JOBS) --rerun-triggers mtime params input --rerun-incomplete \
	--nolock --keep-going --quiet rules host reason --config profile=$(1) $(if $(OVERLAY),overlay=$(abspath $(OVERLAY)))

.DEFAULT_GOAL := help
.PHONY: help venv reproduce rehearse figure smoke test lint bench lab book pages report clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20
	@echo "  variables         PROFILE=mini|full|paper  OVERLAY=FILE  JOBS=$(JOBS)  PYTHON=$(PYTHON)"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 on PATH: install Python 3.11, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: name a newer one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[all]'
	@touch $@

venv: $(STAMP)  ## Python environment with the pinned versions, in .venv

reproduce: $(STAMP)  ## Every run and figure of a profile (PROFILE=mini), resumable
	$(call SNAKEMAKE,$(PROFILE))

figure: $(STAMP)  ## One figure of the paper, and only what it needs (FIG=10; FIG=help lists them)
	$(call SNAKEMAKE,$(PROFILE) figure="$(FIG)") -- figure

smoke: $(STAMP)  ## Every notebook with tiny counts: does it all still run?
	$(call SNAKEMAKE,smoke)

rehearse: OVERLAY = config/overlays/tiny.yaml
rehearse: $(STAMP)  ## The profile paper to its end, on tiny models and files that are made here: build/tiny
	$(BIN)/python tests/tiny.py build/tiny
	$(call SNAKEMAKE,paper) --directory build/tiny

lint: $(STAMP)  ## Ruff on code and notebooks, stripped outputs, the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --extra-keys "metadata.widgets metadata.language_info.version" notebooks/*.ipynb notebooks/exercises/*.ipynb
	$(BIN)/mypy

test: $(STAMP)  ## Lint, types and all tests, the smoke profile among them
	@$(MAKE) --no-print-directory --keep-going -j2 lint pytest  # some tests wait, and the type checker has one thread

.PHONY: pytest
pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

bench: $(STAMP)  ## The benchmarks (tables on the terminal)
	@for script in $(filter-out benchmarks/new_user.py benchmarks/privacy.py benchmarks/race.py benchmarks/rivals.py benchmarks/scores.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

.PHONY: mutants
mutants: $(STAMP)  ## What the tests miss: the code is changed in one place at a time (SAMPLE=200 of them)
	$(BIN)/python -m pip install --quiet $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[mutation]'
	$(BIN)/python tests/mutants.py $(if $(SAMPLE),--sample $(SAMPLE))

.PHONY: race
race: $(STAMP)  ## Five methods over real links of three rates, by the wall clock: 37 minutes, with nothing beside it
	$(BIN)/python benchmarks/race.py

.PHONY: deploy-demo
deploy-demo: $(STAMP)  ## A SuperLink and four SuperNodes here, training over TLS
	$(BIN)/fluxlib run --engine deployment --participants 4 --rounds 3 --task mini-mmlu --out build/deploy --overwrite --set clock.fleet=mixed

lab: $(STAMP)  ## JupyterLab in notebooks/
	$(BIN)/jupyter lab --notebook-dir . notebooks/00_start_here.ipynb

book: $(STAMP)  ## The static book from executed notebooks, with every link checked: build/book/html
	$(BIN)/python docs/book/make_book.py --profile $(PROFILE)

pages: $(STAMP)  ## The generated pages of docs/ and each lesson's answer, written anew
	$(BIN)/python docs/pages/pages.py

report: $(STAMP)  ## Snakemake's HTML page on a finished profile: graph, times, memory
	mkdir -p build/$(PROFILE)
	$(call SNAKEMAKE,$(PROFILE)) --report build/$(PROFILE)/report.html

clean:  ## Remove what can be made again, except results, figures and .venv
	rm -rf build .snakemake .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
