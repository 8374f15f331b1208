# Everything runs in .venv, made from pyproject.toml and the tested versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Threads that spin while they wait slow everything down, many times over, where another process wants the core.
export OMP_WAIT_POLICY ?= passive

.PHONY: venv venv-vllm test test-peer test-slow lint demo arch-table bench-quality bench-scale bench-workers bench-healing bench-ablations bench-budget bench-forecast bench-speed bench-loading bench-stress bench-hardware bench-gpu docs clean bench-papers test-more test-transformers bench-compress bench-peers train-reference

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# vLLM's CPU build with this package, in an environment of its own: it wants older versions of what .venv has.
venv-vllm: .venv-vllm/.installed

.venv-vllm/.installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/pip install -q --no-deps -e .
	touch $@

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy moesvd_quant
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# Our 4-bit result against GPTQModel's own on the same windows: a change of either that matters shows here.
test-peer: venv
	$(BIN)/pytest -m slow tests/test_bars.py -k gptqmodels

# Slow tests worth their minutes on every submission: whole commands, several processes, the wheel in an environment of its own, the
# notebook, GPTQModel reading exports, lm-eval's prompts.
test-more: venv
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and not long"

# What we need of transformers, on the lowest version that pyproject allows and on the newest that was tried. Each has its own packages
# and finds all others in .venv.
TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml).0 5.24.0

.venv-transformers/%/.installed: .venv/.installed
	$(PYTHON) -m venv .venv-transformers/$*
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	  $$(.venv-transformers/$*/bin/python -c "import site; print(site.getsitepackages()[0])")/rest.pth
	.venv-transformers/$*/bin/pip install -q transformers==$*
	touch $@

test-transformers: $(TRANSFORMERS:%=.venv-transformers/%/.installed)
	for version in $(TRANSFORMERS); do .venv-transformers/$$version/bin/python -m pytest -q -m "not slow" tests/model/test_hf_internals.py \
	  tests/model/test_sources.py tests/model/test_stream.py || exit 1; done

test-slow: venv
	$(BIN)/pytest -m slow

lint: venv
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The site, into site/: every link is checked.
docs: venv
	$(BIN)/mkdocs build --strict --quiet

demo: venv
	$(BIN)/moesvd demo --out demo-out

# QUALITY: options of evaluation/benchmarks/quality.py, for example --seen wikitext2 --unseen code --calibration mine.txt
bench-quality: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.quality $(QUALITY)

# Two synthetic models of 6 GB, each with and without a limit: needs 50 GB of disk and hours. Goes on where it was.
bench-scale: venv
	PYTHONPATH=tests MOESVD_THREADS=1 $(BIN)/python -m moesvd_quant.evaluation.benchmarks.scale --folder bench-scale

# One worker and two, in processes and on Ray: minutes, and two cores that nothing else uses.
bench-workers: venv
	PYTHONPATH=tests MOESVD_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m moesvd_quant.evaluation.benchmarks.workers --folder bench-workers

# Bytes, memory and operations of published models, from their shapes: a minute.
bench-hardware: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.hardware

arch-table: venv
	$(BIN)/python tests/architecture_table.py docs/architectures.md .arch-table.jsonl

# What healing is worth on every trained model in $(SHARED)/models: hours on two cores; TOKENS= and STRIDE= make it less.
SHARED ?= ../shared
TOKENS ?= 1000000
STRIDE ?= 1
CORPUS := $(SHARED)/data/corpus
CALIBRATE := $(CORPUS)/wiki.train.jsonl.gz,$(CORPUS)/books.train.jsonl.gz,$(CORPUS)/dialogue_crd3.train.jsonl.gz
LM := $(SHARED)/data/eval/lm
COMMA := ,
SPACE := $(subst ,, )
# Text of every kind that is to be kept: what the model itself was trained on, code included.
HEALING_TEXT := $(LM)/wikitext-2-tokens/wiki.train.tokens.gz,$(subst $(SPACE),$(COMMA),$(foreach kind,wiki books code technical_docs dialogue_crd3,$(CORPUS)/$(kind).train.jsonl.gz))

bench-healing: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.healing $(patsubst %/config.json,%,$(wildcard $(SHARED)/models/*/config.json)) --out bench-healing \
	  --calibrate $(CALIBRATE) --train $(HEALING_TEXT) \
	  --text wikitext2=$(LM)/wikitext-2-raw/wiki.test.raw.gz --text ptb=$(LM)/ptb/ptb.test.txt.gz \
	  --text code=$(CORPUS)/code.valid.jsonl.gz --tokens $(TOKENS) --stride $(STRIDE)

# Every budget against everything that fits in its bytes, on every trained model: an hour on two free cores for 6 M parameters.
bench-budget: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.budget $(foreach m,$(patsubst %/config.json,%,$(wildcard $(SHARED)/models/*/config.json)),--model $(m)) \
	  --seen wikitext2=$(LM)/wikitext-2-raw/wiki.test.raw.gz --seen ptb=$(LM)/ptb/ptb.test.txt.gz \
	  --unseen code=$(CORPUS)/code.valid.jsonl.gz --unseen technical=$(CORPUS)/technical_docs.valid.jsonl.gz \
	  --calibration $(CALIBRATE) --length 256

# Packed models beside their original on random weights: minutes, on cores that nothing else uses. OMP_WAIT_POLICY= as users have it.
bench-speed: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.speed $(SPEED)

# How long a packed checkpoint of 1 GB takes to open: a minute.
bench-loading: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.loading

# `fit` on models that are hard to compress, beside all else in its bytes. STRESS: options, for example --only top-1
bench-stress: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.stress $(STRESS)

# Trains a reference model, in as many sittings as it takes: hours on CPUs, minutes on a GPU. TRAIN: all options, for example
# --data FOLDER --minutes 60 --kind fine, or --help. For less text, a folder of shorter files, which xz makes a quarter smaller than gzip:
# zcat A.jsonl.gz | head -n 5000 | xz -9 > less/A.jsonl.xz
TRAIN ?= --data $(CORPUS)

train-reference: venv
	$(BIN)/python -m moesvd_quant.reference.train $(TRAIN)

# Seconds per million weights that compression takes, by what it does: one thread, minutes. COMPRESS="--shapes coarse --recipes gptq3"
bench-compress: venv
	PYTHONPATH=tests MOESVD_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m moesvd_quant.evaluation.benchmarks.compress $(COMPRESS)

# All that only a GPU can show, in at most nine minutes. GPU="--device cpu --small" rehearses it.
bench-gpu: venv
	PYTHONPATH=tests $(BIN)/python -m moesvd_quant.evaluation.benchmarks.gpu $(GPU)

# Other engines beside this one at equal bytes, each in an environment of its own (.venv-peers): an hour on two cores, llama.cpp's
# compilation included. PEERS: options of evaluation/benchmarks/peers.py, for example --model DIR --only nf4
bench-peers: venv
	MOESVD_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m moesvd_quant.evaluation.benchmarks.peers --calibration $(CALIBRATE) --length 256 \
	  --text wikitext2=$(LM)/wikitext-2-raw/wiki.test.raw.gz --text code=$(CORPUS)/code.valid.jsonl.gz \
	  --text technical=$(CORPUS)/technical_docs.valid.jsonl.gz $(PEERS)

# FORECAST: options of evaluation/benchmarks/forecast.py, for example --model DIR
bench-forecast: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.forecast --text $(LM)/wikitext-2-raw/wiki.test.raw.gz --calibration $(CALIBRATE) $(FORECAST)

# Table 2 with every method, on the embedded model or another: an hour on two cores. PAPERS: options of evaluation/benchmarks/papers.py
bench-papers: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.papers --calibration $(CALIBRATE) --length 256 \
	  --seen wikitext2=$(LM)/wikitext-2-raw/wiki.test.raw.gz --seen ptb=$(LM)/ptb/ptb.test.txt.gz --seen c4=$(LM)/c4/c4_realnewslike_snippets.jsonl.gz \
	  --unseen code=$(CORPUS)/code.valid.jsonl.gz --unseen technical=$(CORPUS)/technical_docs.valid.jsonl.gz \
	  --tasks zero-shot --task-data $(SHARED)/data/eval/tasks --limit 100 $(PAPERS)

# ABLATIONS: options of evaluation/benchmarks/ablations.py, for example --text wikitext2 --calibration mine.txt --table 5
bench-ablations: venv
	$(BIN)/python -m moesvd_quant.evaluation.benchmarks.ablations $(ABLATIONS)

clean:
	rm -rf site demo-out quality-out budget-out forecast-out stress-out bench-healing ablations-out bench-scale bench-workers .arch-table.jsonl papers-out gpu-out peers-out
