# From a fresh clone, with python3 and make alone: every target makes what it needs first.
#
#   make demo     distil the embedded teacher for some minutes and compare teacher and student
#   make test     run the tests
#   make check    format, lint, types, import contract, fast tests: before every commit
#   make slow     run the tests that take long
#   make clean    remove the virtual environment and the caches
#
# PYTHON=python3.12 chooses the interpreter, WORKERS=4 the number of test processes,
# ARGS="..." adds to the command line of the demo or of pytest.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest $(ARGS)
# Compiled programs are kept for the next time; XLA's C++ log shows errors only.
JAX_ENV := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache TF_CPP_MIN_LOG_LEVEL=2
# The tests that need no large compilation.
FAST := $(wildcard tests/test_house.py tests/io tests/data tests/diffusion tests/evaluation)

.PHONY: help demo test check slow clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@sed -n '/^#   make/s/^#   //p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.run-requirements
	$(JAX_ENV) $(RUN) -m examples.tiny_sd.demo $(ARGS)

test: $(VENV)/.dev-requirements $(VENV)/.tpu-compiler
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev-requirements
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist loadfile $(FAST)

slow: $(VENV)/.dev-requirements $(VENV)/.tpu-compiler
	$(PYTEST) -m slow

clean:
	rm -rf $(VENV) .jax_cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Each stamp is newer than what it stands for; an installation that was cut off has none.
$(VENV)/.run-requirements: requirements.txt $(VENV)/.created
	@echo "Installing what running needs into $(VENV) (minutes, the first time)"
	$(RUN) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

# Outside of a mirror of CPU builds, torch brings CUDA along: see requirements-dev.txt.
$(VENV)/.dev-requirements: requirements-dev.txt $(VENV)/.run-requirements
	@echo "Installing what the tests need into $(VENV) (minutes, the first time)"
	$(RUN) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The TPU compiler, in a folder of its own: in the environment, JAX would look for a TPU at every
# start. The release is the one that jax[tpu] wants beside the jax of requirements.txt.
$(VENV)/.tpu-compiler: $(VENV)/.run-requirements
	@echo "Installing the TPU compiler into $(VENV)/tpu (700 MB)"
	$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(VENV)/tpu \
	    libtpu==0.0.42.1
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON): expected Python 3.11 or later;" \
	         "name another one with 'make PYTHON=python3.12 $(MAKECMDGOALS)'" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "error: $(PYTHON) cannot make virtual environments;" \
	         "install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
