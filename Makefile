# One command each: `make demo` installs and proves an example, `make test` installs and runs the tests;
# `make help` lists the others.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
VENV_DOCS ?= .venv-docs
STAMP_DOCS := $(VENV_DOCS)/.installed
export OMP_NUM_THREADS ?= 1
export ORT_DISABLE_TELEMETRY := 1

.PHONY: help setup demo quick test fuzz check thorough lint types layers docs format clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	scripts/install.sh --venv $(VENV) --editable
	@touch $@

$(STAMP_DEV): pyproject.toml
	scripts/install.sh --venv $(VENV) --editable --dev
	@touch $@ $(STAMP)

$(STAMP_DOCS): pyproject.toml
	$(firstword $(wildcard $(PYTHON)) python3) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' >$(VENV_DOCS)/requirements.txt
	$(VENV_DOCS)/bin/python -m pip install -qq -r $(VENV_DOCS)/requirements.txt
	@touch $@

setup: $(STAMP)  ## install the verifier into .venv

demo: $(STAMP)  ## install, then prove one example and refute another
	PYTHON=$(PYTHON) scripts/demo.sh

quick: $(STAMP_DEV)  ## a selection of tests, in under three minutes on two cores (QUICK in tests/conftest.py)
	$(PYTHON) -m pytest -n auto --quick -m "not timing and not slow"

test: $(STAMP_DEV)  ## install what the tests need, then run them all
	$(PYTHON) -m pytest -n auto -m "not timing"
	$(PYTHON) -m pytest -m timing

fuzz: $(STAMP_DEV)  ## random queries against exact truth for two minutes (scripts/fuzz.py --help shows more)
	$(PYTHON) scripts/fuzz.py --minutes 2

lint: $(STAMP_DEV)  ## ruff
	$(VENV)/bin/ruff check .

types: $(STAMP_DEV)  ## type check of verifier/
	$(VENV)/bin/basedpyright --pythonpath $(PYTHON)

layers: $(STAMP_DEV)  ## which folder may import which
	$(VENV)/bin/lint-imports

check: lint types layers test  ## everything that CI checks

thorough: $(STAMP_DEV) $(STAMP_DOCS)  ## all checks and whatever takes hours, with one summary line per part
	$(PYTHON) scripts/thorough.py

docs: $(STAMP_DOCS)  ## the documentation with an API reference as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict --quiet

format: $(STAMP_DEV)  ## rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove caches and build output, not the environment
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VENV_DOCS)/*' -prune -exec rm -rf {} +
