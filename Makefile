# `make demo` and `make test` do all of their own set-up: a virtual environment with pinned versions in .venv.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-crash test-minimum test-package bench docs lint clean

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mapet needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing: on Debian, apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): PyTorch and its tools, about 6 GB, some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## pre-train on 1,437 handwritten digits, print what was learned, leave figures in demo/
	rm -rf demo
	$(BIN)/mapet demo --out demo

test: $(READY) lint  ## every test but the slow ones, on up to 4 cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## the slow ones
	$(BIN)/python -m pytest -q -m slow

test-crash: $(READY)  ## every command ended at each of its writes and resumed: hours; a later call resumes where this one stopped
	$(BIN)/python -m tests.crash_points --state .crash_points.json

test-minimum:  ## unit and parity tests with the lowest versions that pyproject.toml allows; 6 GB in a temporary folder
	tests/minimum.sh $(PYTHON)

test-package: $(READY)  ## wheel and sdist: their content, and a run where they are installed
	$(BIN)/python -m pytest -q -m 'slow or not slow' tests/integration/test_package.py

bench: $(READY)  ## every speed benchmark, about half an hour; PHOTOS=folder measures the tokenizer too
	$(BIN)/python -m benchmarks all $(if $(PHOTOS),--photos $(PHOTOS))

docs: $(READY)  ## the documentation site, in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo site
