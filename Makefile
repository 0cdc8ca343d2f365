# One command each: `make demo` installs and proves an example, `make test` installs and runs the tests.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
export OMP_NUM_THREADS ?= 1
export ORT_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test fuzz check lint types layers format clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	scripts/install.sh --venv $(VENV) --editable
	@touch $@

$(STAMP_DEV): pyproject.toml
	scripts/install.sh --venv $(VENV) --editable --dev
	@touch $@ $(STAMP)

setup: $(STAMP)  ## install the verifier into .venv

demo: $(STAMP)  ## install, then prove one example and refute another
	PYTHON=$(PYTHON) scripts/demo.sh

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

format: $(STAMP_DEV)  ## rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove caches and build output, not the environment
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
