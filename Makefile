# Two commands for a fresh machine with Python 3.10+, pip and make:
#   make demo   teaches the embedded model a subject and draws it, offline (pictures in out/demo)
#   make test   runs the tests
# Both make their own virtual environment in VENV first.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# Threads that wait for each other sleep and do not spin: where something else keeps a core busy, spinning made the
# demo's training up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types docs

demo: $(VENV)/ready
	$(RUN) examples/demo.py

test: $(VENV)/ready
	$(RUN) -m pytest

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/ready
	$(RUN) -m mypy

docs: $(VENV)/ready
	$(RUN) -m pip install --quiet -e ".[docs]" -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "The site is in out/site: open out/site/index.html"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@
