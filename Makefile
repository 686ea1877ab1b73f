# Every command of this repository is a target of this file; `make` alone lists them.
#
# The first target that needs an environment makes .venv, which belongs to this file. It is made again
# when it is incomplete, when the folder has moved, or when PYTHON names another interpreter. It is
# installed into again when pyproject.toml changes. No target needs git or an activated environment.
#
#   PYTHON=python3.12    make .venv from this interpreter (otherwise: the first one found that will do)
#   WORKERS=3            processes that pytest uses, one thread each; some tests wait, so one more than cores
#   ARGS="-k losses"     more arguments for the command of `demo`, `test...` or `bench`
#
# On Linux pip's default PyTorch wheel carries the CUDA libraries. On a machine without a GPU, put the
# smaller CPU wheel in first, as the PyTorch installation page shows, with .venv/bin/pip after `make venv`.

SHELL = /bin/sh
.DEFAULT_GOAL = help
.NOTPARALLEL:
.PHONY: help venv install demo test test-fast test-lowest lint format bench docs site ci clean stale

PYTHON ?=
WORKERS ?= 3
ARGS ?=

BIN = .venv/bin
# Bytecode is written when a module is first imported, also where the environment says otherwise: each
# of the processes that tests start would compile PyTorch again.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
UV_INSTALL = $(BIN)/uv pip install --quiet
# pip takes PyTorch from wherever it is set up to, uv the rest in a tenth of pip's time. uv reads none of
# pip's settings: where it finds no packages, pip goes on.
INSTALL = install() { \
	  $(PIP_INSTALL) torch torchvision uv \
	  && { $(UV_INSTALL) --python $(BIN)/python --editable "$$1" || $(PIP_INSTALL) --editable "$$1"; }; \
	}; install
# Each process takes tests that stand side by side, since they share fixtures.
PYTEST_ON = -m pytest -n $(WORKERS) --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST_ON)
NOTE = once, some minutes: 0.5 GB to download, on Linux 3 GB unless PyTorch is the CPU wheel

# "stale" if .venv cannot be used as it is. `home` is written last, and holds the folder it was made in.
WHICH = -c 'import sys; print(sys.base_prefix, sys.version)'
STALE := $(shell [ "$$(cat .venv/home 2>/dev/null)" = "$$(pwd -P)" ] \
	&& venv=$$(.venv/bin/python $(WHICH) 2>/dev/null) \
	&& { [ -z "$(PYTHON)" ] || [ "$$("$(PYTHON)" $(WHICH) 2>/dev/null)" = "$$venv" ]; } || echo stale)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

venv: .venv/home ## Make an empty .venv (the other targets do this and install into it)

install: .venv/runtime ## Install the package into .venv

demo: .venv/runtime ## Run the demonstration
	$(BIN)/protoclip demo $(ARGS)

test: .venv/compiled ## Run every test
	$(PYTEST) $(ARGS)

test-fast: .venv/compiled ## Run the tests that are not marked slow
	$(PYTEST) -m 'not slow' $(ARGS)

test-lowest: .venv-lowest/dev ## Run them with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST_ON) -m 'not slow' $(ARGS)

lint: .venv/dev ## Check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(BIN)/python scripts/count_rooms.py

format: .venv/dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/runtime ## Run every benchmark, one after another
	@set -e; found=; for file in benchmarks/*.py; do \
	  [ -f "$$file" ] || continue; found=yes; echo "$$file"; $(BIN)/python "$$file" $(ARGS); \
	done; [ -n "$$found" ] || echo "There are no benchmarks yet: each will be a file benchmarks/*.py."

docs: .venv/home ## Check the pages: their links, how many words they have, how long sentences are
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/count_words.py

site: .venv/docs docs ## Build the site of the documentation into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server -d build/site"

ci: lint site test ## What .ci/run runs, one after the other: lint, the site, then test

clean: ## Remove .venv, .venv-lowest, caches and builds
	rm -rf .venv .venv-lowest .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched only after its install has succeeded, so an interrupted one is done again.

.venv/runtime: .venv/home pyproject.toml
	@echo "Installing protoclip into .venv ($(NOTE))"
	@$(INSTALL) '.[report]'
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # also templates that are no Python
	@touch $@

.venv/dev: .venv/home pyproject.toml
	@echo "Installing protoclip and the tools to test it into .venv ($(NOTE))"
	@$(INSTALL) '.[dev]'
	@touch .venv/runtime $@

# Tests, and what they import, which is a fifth of what is installed: once here, not by each worker.
.venv/compiled: .venv/dev
	@$(BIN)/python -m pytest --collect-only -qq >/dev/null 2>&1 || true # an error is told by the tests
	@touch $@

# Both at once, for .ci/run.
.venv/all: .venv/home pyproject.toml
	@echo "Installing protoclip and the tools to test it and to build the site into .venv ($(NOTE))"
	@$(INSTALL) '.[dev,docs]'
	@touch .venv/runtime .venv/dev .venv/docs $@

.venv/docs: .venv/home pyproject.toml
	@echo "Installing protoclip and the tools that build the site into .venv ($(NOTE))"
	@$(INSTALL) '.[docs]'
	@touch $@

# Compiled at once, or the processes that tests start would each compile PyTorch.
.venv-lowest/dev: .venv/home pyproject.toml
	@echo "Installing the lowest versions into .venv-lowest (once, some minutes: on Linux 3 GB to download)"
	@rm -rf .venv-lowest
	@$(PIP_INSTALL) uv
	@$(BIN)/uv venv --quiet --python $(BIN)/python .venv-lowest
	@$(UV_INSTALL) --compile-bytecode --python .venv-lowest/bin/python --resolution lowest-direct \
	  --only-binary :all: --no-binary protoclip --editable '.[dev]'
	@touch $@

.venv/home: $(STALE)
	@found=; new=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  new=$$python; \
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null && found=$$python && break; \
	done; \
	if [ -n "$$found" ]; then \
	  echo "Making .venv with $$("$$found" --version) ($$found)"; \
	  rm -rf .venv && "$$found" -m venv .venv && pwd -P >$@; \
	elif [ -n "$$new" ]; then \
	  echo "error: $$new cannot make virtual environments; install its venv module (Debian, Ubuntu: python3-venv) or name another Python: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	else \
	  echo "error: $(if $(PYTHON),$(PYTHON) is not a,found no) Python 3.11 or newer; install one, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi
