# Everything runs in .venv, made from pyproject.toml and the tested versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv test test-slow lint demo arch-table bench-quality bench-scale clean

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy moesvd_quant
	$(BIN)/pytest -m "not slow"

test-slow: venv
	$(BIN)/pytest -m slow

lint: venv
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

demo: venv
	$(BIN)/moesvd demo --out demo-out

# QUALITY: options of moesvd_quant/quality.py, for example --seen wikitext2 --unseen code --calibration mine.txt
bench-quality: venv
	$(BIN)/python -m moesvd_quant.quality $(QUALITY)

# Two synthetic models of 6 GB: needs 50 GB of disk and hours.
bench-scale: venv
	MOESVD_THREADS=1 $(BIN)/python tests/bench_scale.py --folder bench-scale

arch-table: venv
	$(BIN)/python tests/architecture_table.py docs/architectures.md .arch-table.jsonl

clean:
	rm -rf demo-out quality-out .arch-table.jsonl
