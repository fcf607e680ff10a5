PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup course lab lab-reset app test test-fast notebooks bench ablations claims clean

help: ## what there is to make
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned versions (all other targets do it too)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python {v[0]}.{v[1]} found, 3.10 or newer needed: make PYTHON=python3.11 ..." if v < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

course: $(STAMP) ## run all chapters on the bundled data; pictures and notebooks in build/
	$(PY) -m mar_mini course

lab: $(STAMP) ## open the course in JupyterLab; your copies are in my/
	$(PY) -m mar_mini lab

lab-reset: $(STAMP) ## a fresh copy of one chapter: make lab-reset CHAPTER=06
	@test -n "$(CHAPTER)" || { echo "say which chapter: make lab-reset CHAPTER=06"; exit 2; }
	$(PY) -m mar_mini lab-reset $(CHAPTER)

app: $(STAMP) ## the widgets as one page, for a class or visitors
	$(PY) -m mar_mini app

test: $(STAMP) ## the whole test suite
	$(PY) -m mar_mini test

test-fast: $(STAMP) ## the tests that take seconds
	$(PY) -m mar_mini test --fast

notebooks: $(STAMP) ## build notebooks/ from notebooks/src/
	$(PY) tools/build_notebooks.py

bench: $(STAMP) ## how fast it is, against the computation as published (half an hour, idle machine)
	$(PY) benchmarks/speed.py

ablations: $(STAMP) ## what the choices are worth: 57 small trainings (40 minutes; goes on if stopped)
	$(PY) benchmarks/ablations.py

claims: $(STAMP) ## does every claim of the chapters hold for seeds 0 to 4? (the course five times)
	$(PY) tools/claims.py

clean: ## remove what was built (never my/)
	rm -rf build .pytest_cache .ruff_cache .hypothesis
