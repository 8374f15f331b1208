# Everything runs in .venv, made from pyproject.toml and the tested versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv test test-slow lint demo arch-table bench-ablations clean

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

arch-table: venv
	$(BIN)/python tests/architecture_table.py docs/architectures.md .arch-table.jsonl

# ABLATIONS: options of moesvd_quant/ablations.py, for example --text wikitext2 --calibration mine.txt --table 5
bench-ablations: venv
	$(BIN)/python -m moesvd_quant.ablations $(ABLATIONS)

clean:
	rm -rf demo-out ablations-out .arch-table.jsonl
