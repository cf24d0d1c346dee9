# Every target sets up what it needs first (bootstrap.sh): Debian packages, .venv, the extensions.

PYTHON := .venv/bin/python
FUZZ_SECONDS := $(if $(filter command line environment,$(origin SECONDS)),$(SECONDS),60)
SOAK_SECONDS := $(if $(filter command line environment,$(origin SECONDS)),$(SECONDS),600)
CC ?= cc
C_STRICT := -std=gnu11 -fsyntax-only -O2 -Wall -Wextra -Werror -Wshadow -Wpointer-arith -Wstrict-prototypes \
	-Wmissing-prototypes -Wwrite-strings -Wvla -Icsrc

.DEFAULT_GOAL := help
LINTS := lint-python lint-types lint-c lint-tests

.PHONY: help build fio test check lint fuzz soak clean
.PHONY: $(LINTS) fast-tests

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## Set up .venv and build the extensions
	@./bootstrap.sh

fio: build ## Serve a temporary file as a block device, load it and verify every byte
	@$(PYTHON) -m vdusefast.bench fio bench/jobs/default.fio

test: ## Run every test, with a minute of fuzzing and guests of two kernels
	@./bootstrap.sh test
	@$(PYTHON) tests/parts.py

check: ## The fast inner loop: lint, and beside it the tests that take little time
	@./bootstrap.sh test
	@$(MAKE) --no-print-directory --jobs $(LINTS) fast-tests

lint: ## ruff, mypy --strict, the C compiler's opinion of csrc, and whether pytest finds every test
	@./bootstrap.sh test
	@$(MAKE) --no-print-directory --jobs $(LINTS)

lint-python:
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check --quiet . || { echo "make lint: the files below want 'ruff format':"; \
		$(PYTHON) -m ruff format --check .; exit 1; }

lint-types:
	@$(PYTHON) -m mypy --strict vdusefast

lint-c:
	@find csrc -name "*.[ch]" | sort | xargs -P "$$(nproc)" -n 8 $(CC) $(C_STRICT) -x c

lint-tests:
	@found=$$($(PYTHON) -m pytest tests --collect-only -q 2>&1) || { echo "$$found" | tail -n 30; exit 1; }

fast-tests:
	@$(PYTHON) tests/parts.py --fast

fuzz: build ## Fuzz the parsing code: make fuzz SECONDS=600
	@SECONDS=$(FUZZ_SECONDS) tests/fuzz/run.sh $(FUZZ_SECONDS)

soak: ## The long tests, ten minutes for each measure of time (make soak SECONDS=600 TESTS=tests/vm)
	@./bootstrap.sh test
	@VDUSEFAST_SOAK_S=$(SOAK_SECONDS) $(PYTHON) -m pytest --soak $(or $(TESTS),tests)

clean: ## Remove what was built; .venv stays
	@rm -rf build dist *.egg-info vdusefast/*/*.so tests/fuzz/build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@rm -f .venv/.vdusefast-build
	@find vdusefast tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
