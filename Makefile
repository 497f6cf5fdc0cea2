# Development tasks. Nothing is needed beforehand but Python >= 3.10, pip, make and git.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# How many processes run the tests, each on one core.
WORKERS ?= 2

.PHONY: help install demo test test-matrix lint format docs notebooks bench clean

help:
	@echo "make demo    train a small net with capture in the loop, draw what is in it (under a minute)"
	@echo "make test    run the tests"
	@echo "make test-matrix  run the tests on the oldest and the newest versions allowed"
	@echo "make docs    build the site into site/; a broken link fails"
	@echo "make notebooks  run the notebooks anew"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the code"
	@echo "make bench   what capture costs on this machine (a quarter of an hour); writes bench.json"
	@echo "make clean   remove what the above made, the virtual environment included"

install: $(STAMP)

# torch goes first and pinned: left to the resolver it would pull gigabytes of CUDA packages.
# The package's build backend comes with it, so that no isolated build has to fetch one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(PY) examples/demo.py

test: $(STAMP)
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile

# On the oldest and the newest of what pyproject.toml allows; downloads gigabytes.
test-matrix: $(STAMP)
	$(PY) -m tests.matrix --workers $(WORKERS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The banner that is switched off speaks of another program.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

notebooks: $(STAMP)
	$(PY) -m examples.notebooks

bench: $(STAMP)
	$(PY) -m benchmarks suite --json bench.json

clean:
	rm -rf $(VENV) .venv-matrix build dist site demo*.png maps.html bench.json growth.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf src/*.egg-info
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
