# make setup | demo | test | lint | bench      (PYTHON=python3.12 make setup takes another interpreter)
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo test lint bench

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/longwave train demo --out $(RUN)
	$(BIN)/longwave generate $(RUN) --prompt "Emma " --max-new 400 --seed 0

# Once more what depends on the CPU, as an x86 CPU without AVX-512 computes it: no bfloat16 in oneDNN, eight lanes.
LESSER := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c

test: setup
	$(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_triton.py
	[ "$$(uname -m)" != x86_64 ] || $(LESSER) $(BIN)/python -m pytest -n auto -k "bfloat16 or autocast or numba"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/longwave bench ops
