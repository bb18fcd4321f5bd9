# Every target does its own set-up: on a fresh machine `make quickstart` is the first command to type.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NEWEST := .venv-newest/bin
# of Python 3.12, which the newest Megatron-Core needs: one that is named, on the path, or among pyenv's
ifeq ($(origin NEWEST_PYTHON), undefined)
NEWEST_PYTHON := $(firstword $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python; \
  do $$python -c 'import sys, venv; print(sys.executable) if sys.version_info[:2] == (3, 12) else exit(1)'; done 2>/dev/null))
endif

# one thread per rank: several ranks share the cores, and more threads only get in each other's way
test test-slow test-newest soak quickstart: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-newest soak study lint docs bench gpu-wheels gpu-check clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# torch alone first: its version is then the constraint's own, CPU build included where the machine offers one
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## train a tiny MoE on generated sources, on the CPU if there is no GPU
	$(BIN)/megatron-dynmix quickstart

# two at a time; those that wait for clocks or kill what they started have no heavy ones beside them
test: $(INSTALLED)  ## run the tests that need no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/distributed tests/functional -m 'not gpu and not slow and not alone'
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/distributed -m 'alone and not slow'
	$(BIN)/python -m pytest -n 2 tests/fake
	$(BIN)/python -m pytest -n 2 tests/te

test-slow: $(INSTALLED)  ## run the tests that `make test` leaves out: more layouts
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[evaluate]'
	$(BIN)/python -m pytest -m slow --ignore tests/te
	$(BIN)/python -m pytest -m slow tests/te
	set -e; for version in 2.9.0 2.10.0; do \
	  $(BIN)/python -m pip install -q --no-deps --upgrade --target build/te/$$version transformer-engine==$$version; \
	  DYNMIX_TE=build/te/$$version $(BIN)/python -m pytest -m 'slow or not slow' tests/te; \
	done

# constraints.txt but for what the other file says
.venv-newest/.installed: setup.py constraints.txt constraints-newest.txt
	$(NEWEST_PYTHON) -m venv .venv-newest
	grep -v '^megatron-core==' constraints.txt | cat - constraints-newest.txt > .venv-newest/constraints.txt
	$(NEWEST)/python -m pip install -q -c .venv-newest/constraints.txt torch
	$(NEWEST)/python -m pip install -q -c .venv-newest/constraints.txt -e '.[dev]'
	touch $@

ifneq ($(NEWEST_PYTHON),)
test-newest: .venv-newest/.installed  ## run tests with the newest Megatron-Core, where there is a Python 3.12
	$(NEWEST)/python -m pytest -n 2 --dist loadfile $$(grep -lE 'megatron\.core|megatron import' tests/unit/*.py)
	$(NEWEST)/python -m pytest -n 2 --dist loadfile tests/distributed -m 'newest and not slow'
	if [ -d tests/stock ]; then $(NEWEST)/python -m pytest -n 2 --dist loadfile tests/stock -m 'not slow'; fi
else
test-newest:
	@echo 'test-newest is skipped: no Python 3.12 was found, which megatron-core 0.19 needs; name one by NEWEST_PYTHON'
endif

soak: $(INSTALLED)  ## kill a run KILLS times (50) and compare it with one that was not
	$(BIN)/python -W ignore -m tests.distributed.kills $(or $(KILLS),50)

study: $(INSTALLED)  ## compare strategies on DATA=DIR (chat, general, math, code); tables in OUTPUT (runs/study)
	$(BIN)/python -W ignore examples/study/study.py --data $(or $(DATA),$(error give DATA=DIR)) \
	  --output $(or $(OUTPUT),runs/study)

lint: $(INSTALLED)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the pages under docs/ to build/docs, warnings are errors
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -W ignore tools/config_reference.py docs/configuration.md
	$(BIN)/python -W ignore tools/family_table.py docs/families.md
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

bench: $(INSTALLED)  ## run every benchmark
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

gpu-wheels: $(INSTALLED)  ## put into build/gpu-wheels what a GPU machine without a network lacks
	$(BIN)/python -W ignore -m tools.gpu_check.carry build/gpu-wheels

gpu-check:  ## check one GPU in eight minutes with PYTHON's own packages, no .venv
	$(PYTHON) -W ignore -m tools.gpu_check

clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
