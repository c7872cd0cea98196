# make demo and make test set themselves up from a bare clone; Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A peer whose own dependencies are large and not needed for what we compare is installed without them.
PEERS_ALONE := requirements-peers-alone.txt

.PHONY: install install-dev demo test test-bare test-quick lint types imports docs bench clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "memspan needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[recipes]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(PEERS_ALONE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt -r $(PEERS_ALONE)
	@touch $@

demo: install  ## a minute and a half: what a step holds, whether that is true, what it learns; and a memory
	$(BIN)/memspan demo

test: install-dev  ## everything that CI tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-bare: install-dev  ## what a machine with packages alone can test: no MEMSPAN_DATA
	env -u MEMSPAN_DATA OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs \
	  tests/conformance tests/recipes tests/data tests/commands tests/test_docs_pages.py

test-quick: install-dev  ## less slow tests and comparisons with other libraries
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not peers"

lint: install-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

imports: install-dev
	$(BIN)/lint-imports

docs: install-dev  ## site/, with warnings as errors
	$(BIN)/memspan results --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install-dev  ## every performance claim as a ratio to a named peer, into benchmarks/results
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) site dist build
