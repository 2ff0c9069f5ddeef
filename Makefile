# `make demo` and `make test` need Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest
# Goals on two slow cores: quick 90 s, before each commit; test and chaos 8 minutes each. CONTRIBUTING.md has what was measured.
QUICK := -m "not slow and not chaos and not gpu"
TWO := --numprocesses 2 --dist loadfile --durations 30 --durations-min 5

.PHONY: demo quick test chaos fuzz lint docs lowest clean

demo: $(VENV)/installed
	$(BIN)/python -m search run search/sweeps/sample.toml

quick: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) $(QUICK)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) --no-loadscope-reorder -m "not chaos"

chaos: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO) -m chaos

fuzz: $(VENV)/installed
	FUZZ=10000 $(BIN)/python -m pytest $(TWO) --dist load tests/test_fuzz.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/zensical build --strict # which finds ruff there

# The oldest versions that pyproject.toml names, in an environment of their own (about 7 GB).
lowest:
	rm -rf $(LOWEST) # an older list of versions would be kept
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
		--extra search --extra cluster --extra dev --output-file $(LOWEST)/requirements.txt pyproject.toml
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --requirement $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet --no-deps --editable .
	$(LOWEST)/bin/python -m pytest $(TWO) $(QUICK)

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build results *.egg-info
