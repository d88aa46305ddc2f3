# make demo   the demonstration
# make test   lint, types and the whole test suite
# make docs   the pages of docs and the docstrings as HTML, in build/docs
# make wheel  a wheel with kernels, in dist, which needs torch alone where it is installed
# make test-engines   that wheel inside SGLang and vLLM: 14 GB of packages in build/engines
# All do all set-up in .venv first; nothing has to be installed but make and Python 3.11 or newer.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The first interpreter that is new enough and can make a virtual environment. Looked for only when
# one has to be made; `make PYTHON=/path/to/python` overrides it.
PYTHON = $(shell for python in python3 python3.12 python3.11 python3.13; do \
	if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
		> /dev/null 2>&1; then echo $$python; break; fi; done)

PYTEST_ARGS ?=

# What a wheel carries: kernels of these architectures and hidden sizes.
WHEEL_ARCHS ?= sm_90a,sm_100a,sm_120a
WHEEL_HIDDEN ?= 4096,5120,7168

.PHONY: demo test test-engines docs wheel lint setup clean

demo: $(INSTALLED)
	$(BIN)/python -m mhc_ops demo

# a file to a process, for the kernels that a file lowers once. In the order of their names, with
# which the longest files are not the last ones
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# no build isolation: kernels are compiled by what .venv holds
wheel: $(INSTALLED)
	MHC_OPS_AOT_ARCHS=$(WHEEL_ARCHS) MHC_OPS_AOT_HIDDEN=$(WHEEL_HIDDEN) \
		$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The engines' environments hold their own torch, so none of them is .venv.
test-engines: wheel
	$(BIN)/python tests/real_engines/environment.py --folder build/engines \
		--wheel "$$(ls -t dist/mhc_ops-*-none-*.whl | head -1)"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(INSTALLED)

# torch alone first: with its version settled, nothing below can ask for another build of it.
# No build isolation: the build then needs no package beyond those of the constraints file.
$(INSTALLED): Makefile constraints.txt pyproject.toml setup.py
	@python="$(PYTHON)"; if [ -z "$$python" ]; then \
		echo "mhc-ops needs Python 3.11 or newer with its venv module; none was found" >&2; exit 1; \
	fi; \
	set -x; "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
