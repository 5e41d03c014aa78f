# The first Python that is new enough; `make PYTHON=...` takes another.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
STAMP = .venv/.installed
PIP = -m pip --quiet --disable-pip-version-check

.PHONY: report test quick lab check lock clean help

report: $(STAMP)  ## compress the bundled model, measure it here, write reports/digits-cnn/report.html
	@$(BIN)/shrinkkit run digits-cnn

# Two files of tests at a time, each on one thread: spinning threads that share a core make everything many times slower.
test: $(STAMP)  ## run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

quick: $(STAMP)  ## run the tests that give an answer within a minute
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile -m "not slow"

lab: $(STAMP)  ## open the notebooks in JupyterLab, the first one in front
	@$(BIN)/jupyter lab notebooks/start.ipynb

check: $(STAMP)  ## lint, format, types and imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# To be run with the oldest Python that is served, Debian 12's 3.11.2: some packages' newest releases want 3.11.5.
# torch pins its CUDA packages itself. Left out here, the lock serves machines with and without a GPU.
lock:  ## write requirements.lock from pyproject.toml
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/python" $(PIP) install torch==2.13.0 -e ".[all,dev]"; \
	"$$fresh/bin/python" $(PIP) freeze --exclude-editable > "$$fresh/frozen"; \
	if grep ' @ ' "$$fresh/frozen"; then echo "installed from a file, so without a version to pin"; exit 1; fi; \
	sed -E 's/\+cpu$$//; /^(nvidia|cuda)-|^triton==/d' "$$fresh/frozen" > requirements.lock

clean:  ## remove the environment, caches and runs
	@rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis && git clean -fdqX reports

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t12

# Debian's python3 has venv but not ensurepip, which would put pip into it; the pip outside can do that.
$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "shrinkkit needs Python 3.11 or later. On Debian: apt install python3"; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; \
	else $(PYTHON) -m venv --without-pip .venv && $(PYTHON) $(PIP) --python $(BIN)/python install pip; fi \
	|| { echo "Python cannot make an environment. On Debian: apt install python3-venv"; exit 1; }
	@echo "installing into .venv (once, a minute or two)"
	@$(BIN)/python $(PIP) install --no-compile -r requirements.lock
	@$(BIN)/python $(PIP) install --no-deps -e .
	@touch $@
