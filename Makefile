# The short commands. `make help` lists them; CONTRIBUTING.md says more.

PYTHON ?=
FUZZ_SECONDS ?= 60
QUICK ?=
HOURS ?=

export TW_PYTHON = $(PYTHON)
py = $(or $(PYTHON),.venv/bin/python)
# The package from its sources, for the environments that it is not installed in.
export PYTHONPATH := $(CURDIR)/integrations/torch:$(CURDIR)/cluster/lab$(if $(PYTHONPATH),:$(PYTHONPATH))

# Bytecode is kept, but not among a user's packages: hundreds of processes import torch, and would
# each compile its sources anew.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(CURDIR)/.cache/pycache
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help system setup build release demo test bench convergence scale lint fuzz asan tsan clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=/path/to/python   use that environment (its torch) instead of .venv; nothing is installed into it"

system:  ## system packages (root or sudo); quiet when all are there
	@setup/system.sh

setup: system  ## the same, and .venv with pinned Python packages
	@setup/python.sh $(if $(PYTHON),--use $(PYTHON))

build: setup  ## C++ libraries, tests and Python extension modules, with assertions
	@scripts/build.sh dev

release: setup  ## libraries, benchmarks and Python extension modules, without assertions
	@scripts/build.sh release

demo: release  ## trains two real models on four emulated hosts; QUICK=1: one model, one link, 90 s
	@$(py) -m examples.demo $(if $(QUICK),--quick)

test: build  ## every test: ctest and pytest
	@$(py) scripts/run_tests.py dev --pytest

bench: release  ## the benchmarks: codecs and peers, step times over emulated links; JSON, table in out/bench
	@$(py) -m tests.bench

convergence: release  ## hours: trains six tasks by every method, goes on where it was stopped; HOURS=2: at most that long
	@$(py) -m tests.convergence all $(if $(HOURS),--hours $(HOURS))

scale: release  ## minutes: 8 to 1,024 ranks on a simulated network; writes docs/scale.md
	@$(py) -m cluster.scale

lint: build  ## clang-format, clang-tidy, ruff, mypy
	@$(py) scripts/lint.py

fuzz: TW_PYTHON = $(or $(PYTHON),python3)
fuzz: system  ## each decoder's fuzzer, FUZZ_SECONDS of one core in all; needs no .venv
	@scripts/build.sh fuzz
	@$(TW_PYTHON) scripts/run_fuzzers.py --seconds $(FUZZ_SECONDS)

asan: setup  ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/build.sh asan
	@$(py) scripts/run_tests.py asan

tsan: setup  ## C++ tests under ThreadSanitizer
	@scripts/build.sh tsan
	@$(py) scripts/run_tests.py tsan

clean:  ## what was built; .venv and downloads stay
	@rm -rf build out
	@find integrations -name '*.so' -type l -delete

distclean: clean  ## .venv and caches too
	@rm -rf .venv .cache
