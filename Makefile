# One command each. Variables: PYTHON (3.11 or newer), VENV, OUT, WORKERS, SLOW, BENCH, DATA; for instance
#   make test PYTHON=python3.12 VENV=.venv-3.12
# SLOW=1 adds the tests marked slow: make test SLOW=1
PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= out/demo
WORKERS ?= 2
SLOW    ?=
DATA    ?= data

BIN      = $(VENV)/bin
PIP      = $(BIN)/python -m pip install -q
PACKAGE  = $(VENV)/.installed
TESTING  = $(VENV)/.installed-test
LINTING  = $(VENV)/.installed-lint
BENCHING = $(VENV)/.installed-bench

.PHONY: demo test lint bench bench-learning notebooks docs clean help
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo "make demo       create $(VENV), install, run the main job on the bundled digits into $(OUT)"
	@echo "make test       the same, then the tests; SLOW=1 adds notebooks, compilation and other long ones"
	@echo "make lint       ruff and mypy"
	@echo "make bench      run the samplers against their peers; BENCH=--quick for a short look"
	@echo "make bench-learning  energy priors on MNIST in DATA=folder: density, outliers; log Z; an hour on one core"
	@echo "make notebooks  execute the notebooks again and keep their outputs"
	@echo "make docs       run the demo and put its pictures where the README shows them"
	@echo "make clean      remove $(VENV), out/ and caches"

demo: $(PACKAGE)
	$(BIN)/pyro-ebm debias --data digits --out $(OUT)

test: $(TESTING) demo
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -p tests.rooms $(if $(SLOW),,-m 'not slow')

lint: $(LINTING)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent --config-file= tests/typed_program.py

bench: $(BENCHING)
	$(BIN)/python -m benchmarks.run $(BENCH)

bench-learning: $(PACKAGE)
	$(BIN)/python -m benchmarks.density --data $(DATA)
	$(BIN)/python -m benchmarks.outliers --data $(DATA)
	$(BIN)/python -m benchmarks.log_normalizers

notebooks: $(TESTING)
	$(BIN)/python tests/test_notebooks.py notebooks/*.ipynb

docs: demo
	cp $(OUT)/figures/class_balance.png $(OUT)/figures/energy_landscape.png docs/

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pyro_ebm needs Python 3.11 or newer; '$(PYTHON)' is not (it is: $$($(PYTHON) --version 2>&1 | head -n 1))."; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv."; exit 1; }

# Stamps: an editable install is repeated only when pyproject.toml has changed.
$(PACKAGE): pyproject.toml | $(BIN)/python
	@echo "installing pyro-ebm into $(VENV) (torch is large: minutes on a first run)"
	@$(PIP) -e .
	@touch $@

$(TESTING): pyproject.toml $(PACKAGE)
	@$(PIP) -e '.[test]'
	@touch $@

$(LINTING): pyproject.toml $(PACKAGE)
	@$(PIP) -e '.[lint]'
	@touch $@

$(BENCHING): pyproject.toml $(PACKAGE)
	@$(PIP) -e '.[bench]'
	@touch $@
