# Needs Python >= 3.11, make and a package registry; everything else goes into $(VENV).

# the first of these that is new enough; `make PYTHON=/path/to/python3 ...` chooses another
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c $(NEW_ENOUGH) 2>/dev/null && echo $$p && exit; done; echo python3)
NEW_ENOUGH = 'import sys; sys.exit(sys.version_info < (3, 11))'
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help demo test lint clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(VENV)/.demo-installed ## set up if needed, then adapt the bundled backbone to handwritten digits
	$(BIN)/petiole demo

test: lint ## set up if needed, then check style and types and run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.test-installed ## set up if needed, then check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove caches, wheels and the demo's output; keeps $(VENV), runs and training states
	rm -rf demo dist .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks training -name __pycache__ -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation leaves none; a change of pyproject.toml makes it outdated.
# One call of pip resolves everything together: torch and torchvision must fit each other.
$(VENV)/.demo-installed: pyproject.toml | $(VENV)/.pip-ready
	$(BIN)/python -m pip install --editable '.[demo]'
	@touch $@

# `--group` needs pip >= 25.1
$(VENV)/.test-installed: pyproject.toml | $(VENV)/.pip-ready
	$(BIN)/python -m pip install --editable '.[captions,data,demo,dist,metric,peft,track,vl]' --group dev
	@touch $@

$(VENV)/.pip-ready:
	@$(PYTHON) -c $(NEW_ENOUGH) 2>/dev/null || { echo "error: petiole needs Python >= 3.11, found" \
		"$$($(PYTHON) --version 2>/dev/null || echo no $(PYTHON)): name another with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'pip>=25.1'
	@touch $@
