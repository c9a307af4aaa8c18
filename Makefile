# Everything a developer does; CONTRIBUTING.md describes each target. Each sets up what it needs on
# a fresh machine.

VENV ?= .venv
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
INSTALLED := $(VENV)/.installed
PLUGINS := $(wildcard plugins/*/pyproject.toml)

# Environments of their own, made on first use: tools that no test needs, everything but torch, the
# oldest declared versions, and a place to install what was built.
TOOLS := $(VENV)-tools
CORE := $(VENV)-core
OLDEST := $(VENV)-oldest
DIST := $(VENV)-dist
PIP = -m pip install --quiet --progress-bar off

# The first Python on the PATH that is new enough; looked for only when the environment is made.
PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)

SECONDS ?= 60
TESTS ?=

.PHONY: test test-all test-core test-oldest coverage lint check-files hooks fuzz demo speed
.PHONY: dist test-dist audit news release-notes clean

PYTEST_ARGUMENTS = -n auto --maxprocesses=4 --dist=worksteal
PYTEST = $(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

# Of what pip prints, a line for each package.
PACKAGES = /^ *(Downloading|Using cached|Processing) .*\.whl( |$$)/ \
	{ sub("^ *", "  "); sub(" \\(from .*", ""); print; fflush() } \
	/^Installing collected packages/ { print "Unpacking them ..."; fflush() }

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(TESTS)

test-all: $(INSTALLED)
	$(PYTEST) $(TESTS)

# Files of tests that can be imported without torch. The few tests in them that need it are skipped.
CORE_TESTS := plugins tests/metadata tests/codecs tests/testing \
	$(addprefix tests/test_,endure.py fixtures.py floors.py fuzz.py hints.py no_torch.py plugins.py \
		project_files.py public.py readme.py security.py write_a_format.py) \
	$(addprefix tests/system/test_,fork.py free_memory.py progress.py rate_limit.py threads.py) \
	$(addprefix tests/fleet/test_,parts.py units.py) \
	$(addprefix tests/checkpoint/test_,block_layout.py edits.py model_root.py) \
	$(addprefix tests/payloads/test_,coalesce.py open_files.py) \
	$(addprefix tests/pickles/test_,unpickle.py walk.py) \
	$(addprefix tests/sources/,foreign/test_diagnosis.py test_path_arguments.py test_registry.py \
		test_weight_file_names.py test_zip_directory.py) \
	$(addprefix tests/cli/test_,cli.py completion.py convert_command.py json.py logging.py) \
	$(addprefix tests/writing/test_,copier.py crash.py writer.py) \
	tests/planning/test_plan.py tests/operations/test_compare.py

test-core: $(CORE)/.installed
	$(CORE)/$(SCRIPTS)/python -m pytest $(PYTEST_ARGUMENTS) \
		-m "not slow and not network" $(CORE_TESTS)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/$(SCRIPTS)/python -m pytest $(PYTEST_ARGUMENTS) -m "not slow" $(TESTS)

coverage: $(INSTALLED)
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-files: $(TOOLS)/.installed
	$(TOOLS)/$(SCRIPTS)/typos
	$(TOOLS)/$(SCRIPTS)/zizmor --offline --no-progress .github
	$(TOOLS)/$(SCRIPTS)/pre-commit validate-config
	$(TOOLS)/$(SCRIPTS)/towncrier build --draft

# The hooks of .pre-commit-config.yaml, on every file that git knows.
hooks: $(TOOLS)/.installed
	$(TOOLS)/$(SCRIPTS)/pre-commit run --all-files --show-diff-on-failure

news: $(TOOLS)/.installed
	$(TOOLS)/$(SCRIPTS)/towncrier build --draft

release-notes: $(TOOLS)/.installed
	$(TOOLS)/$(SCRIPTS)/towncrier build

fuzz: $(INSTALLED)
	PYTHONPATH=fixtures $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(PARSERS)

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash fixtures/demo.sh

speed: $(INSTALLED)
	$(BIN)/python benchmarks/gate.py

dist: $(TOOLS)/.installed
	rm -rf dist
	$(TOOLS)/$(SCRIPTS)/python -m build
	$(TOOLS)/$(SCRIPTS)/twine check --strict dist/*

# Without torch, so that it takes seconds: the commands below do not import it.
test-dist: dist
	for file in dist/*.whl dist/*.tar.gz; do \
		rm -rf $(DIST) && $(PYTHON) -m venv $(DIST) \
		&& $(DIST)/$(SCRIPTS)/python $(PIP) click numpy safetensors \
		&& $(DIST)/$(SCRIPTS)/python $(PIP) --no-deps "$$file" \
		&& $(DIST)/$(SCRIPTS)/shardkit --version \
		&& $(DIST)/$(SCRIPTS)/shardkit convert fixtures/good/zip-training.pt -o $(DIST)/out \
		&& $(DIST)/$(SCRIPTS)/shardkit verify $(DIST)/out --against fixtures/good/zip-training.pt \
		|| exit 1; \
	done

# A build such as 2.13.0+cpu is looked up as its version. What has no advisories fails the audit.
audit: $(INSTALLED) $(TOOLS)/.installed
	$(BIN)/python -m pip freeze --exclude-editable > $(TOOLS)/frozen.txt
	sed 's/+.*//' $(TOOLS)/frozen.txt > $(TOOLS)/audited.txt
	$(TOOLS)/$(SCRIPTS)/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
		-r $(TOOLS)/audited.txt

clean:
	rm -rf .venv .venv-* build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz
	rm -f .coverage .coverage.*
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt $(PLUGINS)
	@test -n "$(PYTHON)" || { \
		echo "shardkit needs Python 3.11 or newer, and none is on the PATH;" \
		"install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; print("Creating $(VENV) with Python %d.%d.%d (%s) ..." \
		% (*sys.version_info[:3], sys.executable))'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing shardkit, its plugins and the development tools in $(VENV):" \
		"about 70 packages, 1.5 GB on disk."
	@echo "This takes a few minutes, and longer where torch comes with CUDA, which adds several GB ..."
	@{ $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' \
		$(PLUGINS:%/pyproject.toml=-e ./%) || touch $(VENV)/.failed; } | awk '$(PACKAGES)'
	@! rm $(VENV)/.failed 2>/dev/null || { echo "The installation failed: see above." >&2; exit 1; }
	@touch $@
	@echo "Installed in $(VENV)."

$(TOOLS)/.installed: .ci/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/$(SCRIPTS)/python $(PIP) -r .ci/tools.txt
	@touch $@

$(CORE)/.installed: pyproject.toml .ci/requirements.py $(PLUGINS)
	$(PYTHON) -m venv $(CORE)
	$(CORE)/$(SCRIPTS)/python .ci/requirements.py core > $(CORE)/requirements.txt
	$(CORE)/$(SCRIPTS)/python $(PIP) -r $(CORE)/requirements.txt
	$(CORE)/$(SCRIPTS)/python $(PIP) --no-deps -e . $(PLUGINS:%/pyproject.toml=-e ./%)
	@touch $@

# Only Python 3.11 has wheels of all of them.
$(OLDEST)/.installed: pyproject.toml .ci/requirements.py $(PLUGINS)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/$(SCRIPTS)/python .ci/requirements.py oldest > $(OLDEST)/constraints.txt
	$(OLDEST)/$(SCRIPTS)/python $(PIP) -c $(OLDEST)/constraints.txt -e '.[dev]' \
		$(PLUGINS:%/pyproject.toml=-e ./%)
	@touch $@
