# Two commands: `make demo` and `make test`.  Each sets itself up in .venv (Python 3.10 to 3.12) and needs nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
UV := eval "$$($(BIN)/python requirements/pip_settings.py)"; $(BIN)/uv
STEPS ?= 12
PYTEST_ARGS ?=
# Tests in two processes; which begin where: tests/conftest.py.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
NPU_DEFAULT := $(shell sed -n 's/^default = "\(.*\)"/\1/p' tests/npu_emulator/stacks.toml)
STACK ?= $(NPU_DEFAULT)
NPU_VENV := .venv-npu$(addprefix -,$(filter-out $(NPU_DEFAULT),$(STACK)))

.PHONY: help setup demo test unit lint lock npu npu-setup policy-table clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## the virtual environment for a machine without an accelerator

# Bytecode is compiled here once: a run starts a dozen Python processes, and where PYTHONDONTWRITEBYTECODE is set (as in
# many containers) each of them would compile all of torch, vLLM and verl again.
$(VENV)/.ready: pyproject.toml requirements/cpu.txt requirements/cpu.overrides.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 was found: set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python \
		--override requirements/cpu.overrides.txt -r requirements/cpu.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup ## GRPO on a toy Qwen1.5-MoE, on two cores, minutes
	$(BIN)/python recipes/grpo_tiny_cpu/demo.py --steps $(STEPS)

test: setup lint ## everything that runs without an accelerator
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

unit: setup ## the quick ones
	$(BIN)/python $(PYTEST) tests/unit $(PYTEST_ARGS)

lint: setup ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# cpu: torch, and what a CUDA build of it brings along, are left out: cpu.overrides.txt pins torch, and which build of that
# version an index offers decides what comes with it.  gpu, npu: Linux on x86-64 and Python 3.11, the usual image.
COMPILE = pip compile --quiet --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock'
lock: setup ## compile requirements/ again
	$(UV) $(COMPILE) --universal --python-version 3.10 --override requirements/cpu.overrides.txt \
		--extra cpu --extra dev pyproject.toml -o requirements/cpu.txt
	sed -i -E '/^(torch|torchvision|torchaudio|torchcodec|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)[= ]/d' requirements/cpu.txt
	$(UV) $(COMPILE) --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--override requirements/gpu.overrides.txt --extra gpu pyproject.toml -o requirements/gpu.txt
	$(UV) $(COMPILE) --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--override requirements/npu.overrides.txt --extra npu pyproject.toml -o requirements/npu.txt

# No NPU and no CANN: tests/npu_emulator/README.md, whose "Traps" say why the two variables.
npu-setup: ## torch-npu and vllm-ascend on a stand-in CANN, in .venv-npu (STACK=0.18: another release)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 was found: set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) tests/npu_emulator/build.py --stack $(STACK) --venv $(NPU_VENV)

npu: npu-setup ## tests/npu, on that
	PYTHONDONTWRITEBYTECODE= TVM_FFI_DISABLE_TORCH_C_DLPACK=1 FAKE_NPU_STACK=$(STACK) \
		$(NPU_VENV)/bin/python $(PYTEST) tests/npu $(PYTEST_ARGS)

policy-table: setup ## tests/unit/policy_table.txt again: every decision for each platform and version
	$(BIN)/python tests/unit/policy_table.py

clean: ## remove what was made here
	rm -rf $(VENV) .venv-npu* outputs dist .pytest_cache .mypy_cache .ruff_cache
