# `make demo` and `make test` need Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On two slow cores: quick 90 s, before each commit; test 8 minutes; chaos 8 minutes; fuzz 4, each night.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 5

.PHONY: demo quick test chaos fuzz lint clean

demo: $(VENV)/installed
	$(BIN)/python -m search run search/sweeps/sample.toml

quick: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m "not slow and not chaos"

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m "not chaos"

chaos: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m chaos

fuzz: $(VENV)/installed
	FUZZ=10000 $(BIN)/python -m pytest $(TWO) --dist load tests/test_fuzz.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) results
