# Every target first makes .venv, or renews or mends it; that is silent when nothing is to be done.
PYTHON ?= python3
ARGS ?=

# Where it is set (containers often do), every process would compile all that it imports anew: 15 seconds each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo check test proof faults clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo "  ARGS=... goes to demo, test and proof; PYTHON=... is the Python 3.11 or 3.12 that .venv is made with"

env:  ## make, renew or mend .venv
	@$(PYTHON) scripts/setup_env.py

demo: env  ## the whole way on a small real model, in minutes
	.venv/bin/specforge demo $(ARGS)

check: env  ## lint, format, types, import layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: env  ## the tests, less proofs and those that need a GPU
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

proof: env  ## the slow proofs
	.venv/bin/python -m pytest -m proof $(ARGS)

faults: env  ## all tests of faults, slow ones too; then docs/faults.md
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m 'not gpu' --deselect tests/faults/test_page.py tests/faults $(ARGS)
	.venv/bin/python -m tests.faults.page docs/faults.md

clean:  ## remove .venv and the tools' caches; runs/ and cache/ stay
	rm -rf .venv .venv.lock *.egg-info build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
