# Every target sets up what it needs in .venv first. PYTHON and PYTHON_OLDEST choose the interpreters.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.12
BIN := .venv/bin/python
BIN_OLDEST := .venv-oldest/bin/python
# One process per core; each test process computes on one thread.
PYTEST := -m pytest -n auto --dist loadgroup

.PHONY: help venv demo test test-oldest lint bench gpu clean

help:
	@echo "make demo         train three real models, vanilla and fused, and compare them"
	@echo "make test         the test suite; HYPOTHESIS_PROFILE=deep for the long one"
	@echo "make test-oldest  the same on the oldest supported torch and triton"
	@echo "make lint         ruff and mypy"
	@echo "make bench        the kernel audit and the operator timings"
	@echo "make gpu          the contract and the timings on a GPU machine, in GPU_SECONDS (1200) seconds"

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON_OLDEST) -m venv .venv-oldest
	$(BIN_OLDEST) -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

demo: venv
	$(BIN) -m braze.benchmarks demo

test: venv
	$(BIN) $(PYTEST)

test-oldest: .venv-oldest/ready
	$(BIN_OLDEST) $(PYTEST)

lint: venv
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

bench: venv
	$(BIN) -m braze.benchmarks kernels
	$(BIN) -m braze.benchmarks ops

# A GPU machine may have no network: this uses the Python that it has, and the wheels in wheels/ where there are any.
gpu:
	@mkdir -p build/gpu/path/braze && ln -sfn $(CURDIR)/kernels build/gpu/path/braze/kernels && ln -sfn $(CURDIR)/benchmarks build/gpu/path/braze/benchmarks
	@PYTHONPATH=build/gpu/path $(PYTHON) -m braze.benchmarks.gpu

clean:
	rm -rf .venv .venv-oldest build *.egg-info
