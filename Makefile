# `make demo` and `make test` do all the set-up on a fresh clone; Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test docs quality types style

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing the packages into $(VENV), which takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/crow-hf demo --output_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

# One process per core, with one thread each.
test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

docs: install
	$(BIN)/python docs/make_reference.py

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: install
	$(BIN)/mypy

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
