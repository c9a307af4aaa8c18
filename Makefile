# Everything a developer does: make test, make lint, make fuzz, make demo, make clean. Each sets up what it needs on a fresh machine.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PLUGINS := $(wildcard plugins/*/pyproject.toml)

# The first Python on the PATH that is new enough; looked for only when the environment is made.
PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)

SECONDS ?= 60

.PHONY: test lint fuzz demo clean

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: $(INSTALLED)
	PYTHONPATH=fixtures $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(PARSERS)

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash fixtures/demo.sh

clean:
	rm -rf .venv .venv-* build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt $(PLUGINS)
	@test -n "$(PYTHON)" || { echo "shardkit needs Python 3.11 or newer, and none is on the PATH;" \
		"install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' $(PLUGINS:%/pyproject.toml=-e ./%)
	touch $@
