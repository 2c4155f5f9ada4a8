# Every target sets up .venv by itself; a machine needs Python 3.11 or newer and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check docs bench

demo: .venv/examples
	$(BIN)/python examples/grpo_loop.py --out runs/demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_direction.py tests/test_lean_import.py

docs: .venv/docs
	$(BIN)/zensical build --clean

bench: .venv/examples
	$(PIP) --no-deps trl==1.16.0 verl==0.9.1 liger-kernel==0.8.5 torchao==0.18.0
	$(BIN)/python benchmarks/engine_throughput.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/losses_of_heads.py
	$(BIN)/python benchmarks/routing_bytes.py
	$(BIN)/python benchmarks/conformance.py
	$(BIN)/python benchmarks/quantisers.py --commit "$$(git rev-parse --short HEAD)"
	$(BIN)/python benchmarks/int4_rules.py --commit "$$(git rev-parse --short HEAD)"
	$(BIN)/python benchmarks/tables.py

# torch first and by exact version, so that nothing else decides which build comes.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/%: .venv/torch pyproject.toml
	$(PIP) --editable ".[$*]"
	@touch $@
