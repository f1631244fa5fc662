PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test install lint

demo: install            ## the whole quickstart pipeline, then its table
	. $(BIN)/activate && dvc repro
	@echo
	@cat reports/comparison.txt
	@echo
	@echo "The whole report: $(CURDIR)/reports/index.html"

test: $(VENV)/.installed-test   ## every test, in as many processes as there are cores, at most four
	. $(BIN)/activate && python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

lint: $(VENV)/.installed-test   ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(VENV)/.installed     ## .venv with all that the pipeline needs

$(VENV)/.installed: setup.cfg
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: setup.cfg $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
