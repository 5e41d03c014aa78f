PYTHON ?= python3
BIN = .venv/bin
STAMP = .venv/.installed

.PHONY: report test lab check lock clean help

report: $(STAMP)  ## compress the bundled model, measure it here, write reports/digits-cnn/report.html
	@$(BIN)/shrinkkit run digits-cnn

test: $(STAMP)  ## run the whole test suite
	@$(BIN)/python -m pytest

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

check: $(STAMP)  ## lint, format and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock:  ## write requirements.lock anew from pyproject.toml
	@rm -rf .venv && $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet torch==2.13.0 && $(BIN)/pip install --quiet -e ".[dev]"
	@$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//; s/ @ .*//' > requirements.lock

clean:  ## remove the environment, caches and runs
	@rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis && git clean -fdqX reports

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t12

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -m venv .venv || { echo "Python's venv is missing. On Debian: apt install python3-venv"; exit 1; }
	@echo "installing into .venv (once, a minute or two)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
