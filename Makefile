# What a developer calls, and .ci/run too. `make help` lists it.
# Everything that needs the environment depends on its stamp: made once, remade when what it is made of changes.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help setup fix check test test-busy cover e2e compat docs sim sim-store bench gpu demo demo-loading demo-ray lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv (CPU builds of torch and vLLM), once
	@:

$(READY): pyproject.toml tools/setup_env.py tools/requirements-cpu.lock
	@python3 tools/setup_env.py

fix: $(READY) ## mend what ruff can mend, and format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

check: $(READY) ## ruff, formatting, types, import rules, prose
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/prose.py

WORKERS ?= 2
# Two at a time: a server on real vLLM starts on one processor, and takes 3 GB.

test: $(READY) ## all tests but the longer matrix on real vLLM; ARGS="-k name" for some, WORKERS=0 for one at a time
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not e2e_long and not gpu" $(ARGS)

cover: $(READY) ## the same with branch coverage, which must be 90 %
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not e2e_long and not gpu" --cov --cov-report=term $(ARGS)

test-busy: $(READY) ## the tests beside two busy loops, as on a CI machine that runs other work
	@trap 'kill $$(jobs -p)' EXIT; for _ in 1 2; do $(BIN)/python -c 'while True: pass' & done; $(MAKE) test

e2e: $(READY) ## every test on real vLLM, the longer matrix too
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "e2e or e2e_long" $(ARGS)

# The newest vLLM with a CPU build is the one of .venv; the oldest that pyproject.toml allows gets an environment of its own.
OLDEST := 0.26.0
OLDEST_TORCH := 2.11.0
COMPAT_TESTS = tests/engine tests/e2e/test_serve.py \
	tests/e2e/test_resume_exact.py::test_a_sample_of_requests_goes_on_as_if_unmoved \
	tests/e2e/test_migration_exact.py::test_a_sample_of_requests_is_moved_unnoticed

compat: $(READY) ## the loader, exactly resumed and moved requests, on the oldest and the newest vLLM
	@oldest=$$(UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" python3 -m tools.compat_env $(OLDEST) $(OLDEST_TORCH)) || exit 1; failed=0; \
	for python in $$oldest $(BIN)/python; do \
		version=$$($$python -c 'from importlib.metadata import version; print(version("vllm"))'); \
		if $$python -m pytest -q $(COMPAT_TESTS) $(ARGS); \
		then echo "vllm $$version: passed"; else echo "vllm $$version: FAILED"; failed=1; fi; \
	done; exit $$failed

docs: $(READY) ## the documentation as a site in build/site; a dead link fails
	@$(BIN)/python -m tools.reference
	@python3 -m tools.docs_site

sim: $(READY) ## the router's core beside five other policies, on a virtual clock; ARGS="--help" for its options
	@$(BIN)/sllm-vllm simulate $(ARGS)

sim-store: $(READY) ## what the store's policies are worth on a trace, on a virtual clock; ARGS="--trace FILE" for a real one
	@$(BIN)/python -m benchmarks.store.sim $(ARGS)

bench: $(READY) ## load time beside the other loaders; ARGS="--help" for its options
	@$(BIN)/python -m benchmarks.loading $(ARGS)

demo: $(READY) ## on one screen: seconds to the first token, stock beside ours, and a stream that moves
	@$(BIN)/python -m benchmarks.demo $(ARGS)

demo-loading: $(READY) ## a model of 1.2 GB: stock, converting and loading start
	@$(BIN)/python -m benchmarks.demo.loading $(ARGS)

demo-ray: $(READY) ## four models on a Ray cluster of three nodes on this machine, whose parts are killed under load
	@$(BIN)/python -m benchmarks.ray.demo $(ARGS)

# On a GPU machine there may be no .venv, and PYTHON may have torch and pytest alone. So only the files that have such a
# test are collected, and options of pytest's plug-ins are left out.
PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,python3)
GPU_TESTS = $(shell grep -rlE --include='*.py' 'mark\.gpu' tests)

gpu: ## tests that need CUDA; PYTHON=python3 chooses who runs them
	@if ! $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		echo "no GPU test was run: $(PYTHON) has no torch that sees a CUDA device"; \
	elif [ -z "$(GPU_TESTS)" ]; then \
		echo "no GPU test was run: no test has the mark gpu"; \
	else \
		$(PYTHON) -m pytest -o addopts="--import-mode=importlib -ra" -m gpu $(GPU_TESTS) $(ARGS); \
	fi

lock: ## resolve the newest dependencies into tools/requirements-cpu.lock
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" python3 tools/setup_env.py --lock

clean: ## remove .venv and every cache
	@rm -rf $(VENV) .compat .docs build dist htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
