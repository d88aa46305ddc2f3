# make demo   the demonstration
# make check  lint, types and the quick tests: what to run while working
# make test   lint, types and the whole test suite
# make docs   the pages of docs and the docstrings as HTML, in build/docs
# make wheel  a wheel with kernels, in dist, which needs torch alone where it is installed
# make test-engines   that wheel inside SGLang and vLLM: 14 GB of packages in build/engines
# make same-cuda BASE=REVISION   the kernels that have other CUDA than at that revision
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

# What a wheel carries: kernels of these architectures and hidden sizes, and a native library for the
# release series of each of these versions of torch, whose wheels are fetched once.
WHEEL_ARCHS ?= sm_90a,sm_100a,sm_120a
WHEEL_HIDDEN ?= 4096,5120,7168
WHEEL_TORCH ?= 2.11.0 2.12.1 2.13.0 2.14.1
WHEEL_TORCH_FOLDERS = $(WHEEL_TORCH:%=build/torch-%)

.PHONY: demo check test test-engines docs wheel same-cuda lint setup clean

demo: $(INSTALLED)
	$(BIN)/python -m mhc_ops demo --picture build/demo.png

# a process that has no more tests takes some of the other's; both use what either has compiled
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: lint
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test: lint
	$(PYTEST) $(PYTEST_ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# no build isolation: kernels are compiled by what .venv holds
wheel: $(INSTALLED) $(WHEEL_TORCH_FOLDERS)
	MHC_OPS_AOT_ARCHS=$(WHEEL_ARCHS) MHC_OPS_AOT_HIDDEN=$(WHEEL_HIDDEN) \
		MHC_OPS_AOT_TORCH="$$(echo $(WHEEL_TORCH_FOLDERS:=/*.whl) | tr ' ' ,)" \
		$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

build/torch-%: | $(INSTALLED)
	rm -rf $@.part
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $@.part torch==$*
	mv $@.part $@

# The engines' environments hold their own torch, so none of them is .venv.
test-engines: wheel
	$(BIN)/python tests/real_engines/environment.py --folder build/engines \
		--wheel "$$(ls -t dist/mhc_ops-*-none-*.whl | head -1)"

same-cuda: $(INSTALLED)
	$(BIN)/python benchmarks/same_cuda.py "$(BASE)"

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
