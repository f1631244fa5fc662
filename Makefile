PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
ACTIVATE = . $(BIN)/activate
# As many processes as there are cores, at most four; tests that share a fixture run in one of them.
PYTEST = $(ACTIVATE) && python -m pytest --numprocesses logical --maxprocesses 4 \
	--dist loadgroup --no-loadscope-reorder

# The environment as it is: the targets of a GPU install nothing and need no network.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SIZE ?= thesis

.PHONY: demo test test-fast test-slow test-all gpu-tests gpu-benchmarks release-check \
	result-tables lint docs install

demo: install            ## the whole quickstart pipeline, then its table
	$(ACTIVATE) && dvc repro
	@echo
	@cat reports/comparison.txt
	@echo
	@echo "The whole report: $(CURDIR)/reports/index.html"

test: $(VENV)/.installed-test   ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.installed-test   ## only short tests, without real images
	$(PYTEST) -m "not slow and not medium and not real"

test-slow: $(VENV)/.installed-test   ## only the slow tests
	$(PYTEST) -m slow

test-all: $(VENV)/.installed-test   ## every test
	$(PYTEST)

gpu-tests:               ## only the tests that need a CUDA device
	@$(GPU_PYTHON) -m benchmarks.gpu.device
	$(GPU_PYTHON) -m pytest -m cuda

gpu-benchmarks:          ## what a CUDA device reaches: tables and JSON in gpu-benchmarks/
	@$(GPU_PYTHON) -m benchmarks.gpu.device
	$(GPU_PYTHON) -m benchmarks.gpu all --out gpu-benchmarks --size $(GPU_SIZE)

release-check: $(VENV)/.installed-test   ## dvc.lock, metrics and reports belong to this commit
	$(ACTIVATE) && python -m pytest tests/release_check.py

result-tables: $(VENV)/.installed   ## write the tables of docs/results/ from the files in results/
	$(ACTIVATE) && python -m benchmarks.result_tables

lint: $(VENV)/.installed-test   ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.installed-docs   ## the site, docs/_build/index.html; a broken link is an error
	$(ACTIVATE) && sphinx-build --fail-on-warning --fresh-env --quiet -c docs . docs/_build

install: $(VENV)/.installed     ## .venv with all that the pipeline needs

$(VENV)/.installed: setup.cfg
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: setup.cfg $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: setup.cfg $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
