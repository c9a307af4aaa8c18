# Everything a developer does: make test, make test-all, make lint, make fuzz, make demo, make clean. Each sets up what it
# needs on a fresh machine.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PLUGINS := $(wildcard plugins/*/pyproject.toml)

# The first Python on the PATH that is new enough; looked for only when the environment is made.
PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)

SECONDS ?= 60

.PHONY: test test-all lint fuzz demo clean

PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

# Of what pip prints, a line for each package.
PACKAGES = /^ *(Downloading|Using cached|Processing) .*\.whl( |$$)/ { sub("^ *", "  "); sub(" \\(from .*", ""); print; fflush() } \
	/^Installing collected packages/ { print "Unpacking them ..."; fflush() }

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

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
	@$(PYTHON) -c 'import sys; print("Creating $(VENV) with Python %d.%d.%d (%s) ..." % (*sys.version_info[:3], sys.executable))'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing shardkit, its plugins and the development tools in $(VENV): about 70 packages, 1.5 GB on disk."
	@echo "This takes a few minutes, and longer where torch comes with CUDA, which adds several GB ..."
	@{ $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' $(PLUGINS:%/pyproject.toml=-e ./%) \
		|| touch $(VENV)/.failed; } | awk '$(PACKAGES)'
	@! rm $(VENV)/.failed 2>/dev/null || { echo "The installation failed: see above." >&2; exit 1; }
	@touch $@
	@echo "Installed in $(VENV)."
