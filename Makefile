# `make demo` and `make test` do everything from a bare clone: environment, install, weights, run.

QUESTION ?= What is the capital of France, and what is it known for?
MAX_NEW_TOKENS ?= 128

COUNT ?= 5000
SEED ?= 0

export JAXDECODE_PYTHON
BIN := .venv/bin

# Two processes, each test file in one of them.
PYTEST := -m pytest -n 2 --dist loadfile

.PHONY: demo test test-live test-compiled test-mutations test-full-size fuzz check-figure lint types env env-hf env-check weights clean

demo: env
	@$(BIN)/python scripts/demo.py --max-new-tokens $(MAX_NEW_TOKENS) -- "$$DEMO_QUESTION"
demo: export DEMO_QUESTION := $(value QUESTION)

test: lint types weights
	$(BIN)/python $(PYTEST) --ignore tests/live

# The same models in transformers and torch, in an environment of their own.
test-live: env-hf weights
	JAXDECODE_HF_PYTHON=.venv-hf/bin/python $(BIN)/python -m pytest tests/live

# Programs compiled for cards that are not here, and run: an environment that also holds NVIDIA's compiler.
test-compiled: env-check
	.venv-check/bin/python $(PYTEST) tests/aot tests/ptx tests/kernels -k "not interpreted"
	.venv-check/bin/jaxdecode check llama2-7b opt-6.7b chatglm2-6b --batch 1,8 --strict \
		--gpu a100-80gb --gpu rtx3090 --gpu rtx4090 --gpu h100

# Every cell of the paper's figure compiled for its card: a quarter of an hour. Its tables go to benchmarks/results/compiled.
check-figure: env-check
	.venv-check/bin/python benchmarks/figure_cells.py --csv benchmarks/results/compiled/cells.csv \
		--kernels benchmarks/results/compiled/kernels.csv

# Faults planted in the kernels, each found by a test.
test-mutations: env-check
	.venv-check/bin/python tests/mutations.py

# ChatGLM2-6B at its real size, with random weights, converted and run: needs 25 GB of disk and 18 GB of memory.
test-full-size: env
	$(BIN)/python tests/convert/full_size.py .cache/full-size

# Odd and hostile models for the converter, COUNT of them; those that break a law are left in .cache/fuzz.
fuzz: env
	$(BIN)/python tests/convert/fuzz/run.py --count $(COUNT) --seed $(SEED) --keep .cache/fuzz

lint: env
	$(BIN)/ruff check .

types: env
	$(BIN)/pyright --pythonpath $(BIN)/python

env:
	@scripts/bootstrap.sh .venv "3.12 3.13 3.14" -c constraints.txt -e '.[test]'

env-check:
	@scripts/bootstrap.sh .venv-check "3.12 3.13 3.14" -c constraints.txt -e '.[test,check]'

# Python 3.11 comes first: on Linux its newest torch on the package index is a small build without CUDA.
env-hf:
	@scripts/bootstrap.sh .venv-hf "3.11 3.12 3.13 3.14" -r scripts/hf-requirements.txt

weights: env
	@$(BIN)/python scripts/smollm2.py

clean:
	rm -rf .venv .venv-hf .venv-check .cache
