# Two commands for a fresh machine with Python 3.10+, pip and make:
#   make demo   teaches the embedded model a subject and draws it, offline (pictures in out/demo)
#   make test   runs the tests; make test-fast leaves out the slow ones
# Each makes its own virtual environment in VENV first.
VENV ?= .venv
PYTHON ?= python3
SITE ?= out/site
RUN := $(VENV)/bin/python
# Threads that wait for each other sleep and do not spin: where something else keeps a core busy, spinning made the
# demo's training up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests of tiny models are faster in two processes of one thread each than in one process of two. A file stays in one
# process, so that what its tests share is made once. None asks the hub, which without a network takes a minute to fail.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

.PHONY: ready demo test test-fast test-quantised lint types docs

ready: $(VENV)/ready

demo: $(VENV)/ready
	$(RUN) examples/demo.py

test: $(VENV)/ready
	$(PYTEST)

test-fast: $(VENV)/ready
	$(PYTEST) -m "not slow and not browser"

# bitsandbytes and torchao make every start of Python a second slower, so the other tests do without them.
test-quantised: $(VENV)/ready
	$(RUN) -m pip install --quiet -e ".[quantised]" -c constraints.txt
	$(PYTEST) tests/training/test_base_precision.py tests/training/test_optimizers.py

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/ready
	$(RUN) -m mypy

docs: $(VENV)/ready
	$(RUN) -m pip install --quiet -e ".[docs]" -c constraints.txt
	$(RUN) tools/refusals.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir "$(SITE)"
	@echo "The site is in $(SITE): open $(SITE)/index.html"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@
