# `make demo` and `make test` do everything from a bare clone: environment, install, weights, run.

QUESTION ?= What is the capital of France, and what is it known for?
MAX_NEW_TOKENS ?= 128

export JAXDECODE_PYTHON
BIN := .venv/bin

# Two processes, each test file in one of them.
PYTEST := -m pytest -n 2 --dist loadfile

.PHONY: demo test test-live test-compiled test-mutations kernel-report lint types env env-hf env-check weights clean

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
	.venv-check/bin/python benchmarks/kernel_report.py --batch 1 --batch 8 --context 1024

# Every kernel compiled at every shape of the paper's models: most of half an hour.
kernel-report: env-check
	.venv-check/bin/python benchmarks/kernel_report.py

# Faults planted in the kernels, each found by a test.
test-mutations: env-check
	.venv-check/bin/python tests/mutations.py

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
