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
	@echo "make gpu          the contract and the timings on a GPU machine, with what is installed there"

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

# A GPU machine may have no network: this uses the Python, torch and triton that it already has.
gpu:
	@$(PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: torch sees no GPU on this machine; run it on one that has torch>=2.11, triton>=3.6 and pytest, hypothesis, rich')"
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest tests/test_ops.py
	$(PYTHON) -m braze.benchmarks ops --device cuda --json benchmarks/results/ops-cuda.json

clean:
	rm -rf .venv .venv-oldest build *.egg-info
