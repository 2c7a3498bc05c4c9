# Every target sets itself up: it needs Python >= 3.11 with venv and a C++ compiler, nothing else.
# `make PYTHON=python3.12 test` picks another interpreter for a new .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: help demo test slow lint bench bench-kernels clean

help:
	@echo "make demo    train a small policy with PPO on this machine, into runs/demo"
	@echo "make test    the quick test suite"
	@echo "make slow    the end-to-end tests"
	@echo "make lint    ruff and pyright"
	@echo "make bench   one PPO iteration against TRL's last PPOTrainer"
	@echo "make bench-kernels   every op against its peers (TRL, Liger, torch.compile), an hour"
	@echo "make clean   remove what the other targets made, .venv included"

demo: $(VENV)/.ready
	$(BIN)/fastppo demo --out runs/demo

test: $(VENV)/.ready-dev
	$(BIN)/pytest

slow: $(VENV)/.ready-dev
	$(BIN)/pytest -m slow

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(VENV)/.ready-dev
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python bench/compare_ppo.py

bench-kernels: $(VENV)/.ready-dev
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench-kernels]'
	bash bench/kernels.sh runs/kernels.jsonl

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: pip then takes the build this machine offers (CPU or CUDA), and nothing after replaces it.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"fastppo needs Python >= 3.11, and $(PYTHON) is {sys.version.split()[0]}: run make PYTHON=/path/to/newer/python")'
test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install -c constraints.txt torch
$(BIN)/python -m pip install -c constraints.txt -e '$(1)'
endef

$(VENV)/.ready: $(INPUTS)
	$(call install,.)
	@touch $@

$(VENV)/.ready-dev: $(INPUTS)
	$(call install,.[dev])
	@touch $(VENV)/.ready $@
