# make demo | demo-full | benchmark | test | test-quick | test-long | lint | bench | gpu | clean: each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo demo-full benchmark test test-quick test-long lint bench gpu clean
.DEFAULT_GOAL := demo

# For Linux the package index has PyTorch with CUDA, gigabytes. Without an NVIDIA GPU the CPU build is enough, where
# PyTorch's own index answers within seconds.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ANSWERS := import signal, urllib.request as u; signal.alarm(5); u.urlopen("$(CPU_INDEX)/", timeout=3)
MODERN := import sys; sys.exit(sys.version_info < (3, 10))

$(STAMP): requirements.txt requirements-dev.txt requirements-cpu.lock
	@$(PYTHON) -c '$(MODERN)' || { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet -r requirements-dev.txt; \
	else \
	  cpu=; test "$$(uname)" = Linux && $(PYTHON) -c '$(ANSWERS)' >/dev/null 2>&1 && cpu=--extra-index-url=$(CPU_INDEX); \
	  $(BIN)/pip install --quiet $$cpu -r requirements-cpu.lock || \
	  $(BIN)/pip install --quiet -r requirements-dev.txt; \
	fi
	touch $(STAMP)

# About half the training that README.md's table has; without --minutes it is the whole, 25 minutes.
demo: $(STAMP)
	$(BIN)/python quickstart.py --outdir=demo --minutes=15 --jobs=2

demo-full: $(STAMP)
	$(BIN)/python quickstart.py --outdir=demo-full --only=all --jobs=2

# All methods on Fashion-MNIST, one kind of label noise: hours. benchmark.py has the others.
benchmark: $(STAMP)
	$(BIN)/python benchmark.py --outdir=benchmark --jobs=2

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

# The packages without whole scripts, attacks and benchmarks: about a minute.
test-quick: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m "not long and not slow" \
	  --ignore=tests/scripts --ignore=tests/hostile --ignore=tests/benchmarks

test-long: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m "long or not long"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis demo demo-full demo-long
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
