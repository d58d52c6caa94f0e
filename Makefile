# make quickstart   a venv, the project, and a real fine-tuning with its evaluation
# make test         what the tests need, then the tests (CI runs the same)
# make lint         ruff and mypy
# make long-inputs  every attention by length, some minutes, into docs/long-inputs.md
# make recipes      every shipped recipe whole, some hours, and the table of what they reach in docs/recipes.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: quickstart test lint recipes long-inputs bench clean

quickstart: $(VENV)/.installed
	$(BIN)/zoo train recipes/bert/finetune-topics.yaml --resume
	@echo
	@echo "Try next:"
	@echo "  $(BIN)/zoo evaluate runs/bert-finetune-topics      # the test set again, from the saved model"
	@echo "  $(BIN)/zoo train --help                            # your own data: recipes/bert/finetune-topics.yaml is a template"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

recipes: $(VENV)/.installed
	$(BIN)/python -m zoo.recipe_table

long-inputs: $(VENV)/.installed
	$(BIN)/python -m zoo.bench.attention

bench: $(VENV)/.installed
	$(BIN)/zoo bench finetune recipes/bert/finetune-topics.yaml --max-length 128 --max-length 256

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a minute or two) ..."
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
