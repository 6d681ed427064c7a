# `make run` and `make test` do everything on a fresh machine; the other targets are their parts.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
INSTALLED := $(VENV)/.installed
# A test has one thread, so two processes take two cores. PYTEST_ADDOPTS="-n 0" runs tests in one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: run test test-slow test-all quick check docs release install clean

run: install
	$(BIN)/fed-dpsat run simulations/digits_dpsat.toml --out $(OUT)

test: check
	$(PYTEST)

test-slow: install
	$(PYTEST) -m slow

test-all: test test-slow

# Numerics and optimizers in half a minute; engines and stacks take longer.
quick: install
	$(PYTEST) tests/step --ignore tests/step/gradients --ignore tests/step/test_stacked.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Into site/; a broken link fails. The reference pages and the navigation are written from the code first.
docs: install
	$(BIN)/python -m tools.reference
	$(BIN)/zensical build --strict

# Into dist/: sdist, wheel and documentation, checked in an empty environment; uploads nothing.
release: install
	$(BIN)/python -m tools.release

install: $(INSTALLED)

# constraints.txt says which versions were tested together, and why any is pinned.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch, Flower, Ray and others. This takes some minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[dev]"
	@touch $@
	@echo "Installed."

clean:
	rm -rf $(VENV)
