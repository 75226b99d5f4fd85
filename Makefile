# Everything a developer runs. Needs only python3 (3.11 or newer) and make.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12 setup` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# For two cores: each worker runs two PostgreSQL servers of its own, and tests of Dagster wait for most of their time.
WORKERS ?= 3
PYTEST_ARGS ?=
BENCH_ARGS ?=

# Without its compiled files, each process would compile all that it imports of Dagster anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions soak ui bench lint format docs

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the program and everything its tests need

# The stamp is written last, so an interrupted installation is done again. `--no-compile`: most of what is installed
# with Dagster is never imported, and Python compiles the rest when it is.
# `--no-build-isolation` builds with the locked hatchling; an isolated build would take whichever is newest.
$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "make setup needs Python 3.11 or newer on the PATH; found: $$(python3 --version 2>&1)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time)"
	@$(BIN)/python -m pip install -qq --constraint requirements.lock hatchling
	@$(BIN)/python -m pip install -qq --no-compile --constraint requirements.lock --no-build-isolation --editable '.[demo,dev,docs]'
	@touch $@
	@echo "ready: $(BIN)/sync-pipeline"

demo: setup ## sync two embedded PostgreSQL servers, live, and verify them equal
	@$(BIN)/sync-pipeline demo

ui: setup ## the demo's servers with `dagster dev` on 127.0.0.1:3000, until Ctrl-C
	@$(BIN)/sync-pipeline demo --ui

lint: setup ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite what ruff can rewrite
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: lint ## lint, then the whole test suite; PYTEST_ARGS adds arguments
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not soak' $(PYTEST_ARGS)

test-versions: setup ## the core suite on every supported PostgreSQL found on this machine
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --all-pg-versions -m 'core and not soak' $(PYTEST_ARGS)

soak: setup ## half an hour (SOAK_MINUTES) of faults on both sides, then the long forms of the tests
	$(BIN)/python -m tests.soak
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m soak $(PYTEST_ARGS)

bench: setup ## measure everything, beside logical replication; BENCH_ARGS=--quick tries it out
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: setup ## build the site of docs/ into site/; a broken link or anchor is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict
	@echo "built: site/index.html"
