# `make demo` and `make test` need Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TWO := --numprocesses 2 --dist loadfile --durations 30 --durations-min 5

.PHONY: demo test chaos lint docs clean

demo: $(VENV)/installed
	$(BIN)/python -m search run search/sweeps/sample.toml

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m "not chaos"

chaos: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m chaos

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/zensical build --strict # which finds ruff there

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) results
