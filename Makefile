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
KIT_ARGS ?=
# For demo.py: --rollout vllm, --tp 2, settings of verl's.
DEMO_ARGS ?=
# For ab.py: --tp 2, settings of verl's.
R3_ARGS ?=
# Tests in two processes; which begin where: tests/conftest.py.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
NPU_DEFAULT := $(shell sed -n 's/^default = "\(.*\)"/\1/p' emulator/stacks.toml)
STACK ?= $(NPU_DEFAULT)
# No NPU and no CANN: emulator/README.md, whose "Traps" say why these two.
NPU_ENV := PYTHONDONTWRITEBYTECODE= TVM_FFI_DISABLE_TORCH_C_DLPACK=1
NPU_VENV := .venv-npu$(addprefix -,$(filter-out $(NPU_DEFAULT),$(STACK)))

.PHONY: help setup demo npu-demo r3 npu-r3 all-stacks reports-stack stacks test long unit lint docs lock npu npu-setup \
	cluster gpu-kit megatron policy-table clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## the virtual environment for a machine without an accelerator

# Bytecode is compiled here once: a run starts a dozen Python processes, and where PYTHONDONTWRITEBYTECODE is set (as in
# many containers) each of them would compile all of torch, vLLM and verl again.
# In .ready stands how many seconds it took.
$(VENV)/.ready: pyproject.toml requirements/cpu.txt requirements/cpu.overrides.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 was found: set PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "PYTHON=$(PYTHON) does not run Python 3.10, 3.11 or 3.12: set PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing torch, vLLM, verl and what they need into $(VENV): one to three minutes"
	@$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'; \
	$(UV) pip install $(if $(MAKE_TERMERR),,--quiet) --compile-bytecode --python $(BIN)/python \
		--override requirements/cpu.overrides.txt -r requirements/cpu.txt; \
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	echo $$SECONDS > $@

ifeq ($(filter-out $(NPU_DEFAULT),$(STACK)),)
demo: setup ## GRPO on a toy Qwen1.5-MoE, on two cores, minutes (STACK=NAME: on another of `make stacks`)
	$(BIN)/python recipes/grpo_tiny_cpu/demo.py --steps $(STEPS) $(DEMO_ARGS)
else
demo: .venv-$(STACK)/.ready
	$(<D)/bin/python recipes/grpo_tiny_cpu/demo.py --steps $(STEPS) --out outputs/$(STACK) $(DEMO_ARGS)
endif

# Python with the stand-in CANN, in the environment of one of `make stacks`; it is made first.
ON_NPU = name=$$($(PYTHON) requirements/stacks.py emulator $(filter-out $(NPU_DEFAULT),$(STACK))); \
	$(MAKE) npu-setup STACK=$$name; \
	[ $$name = $(NPU_DEFAULT) ] && venv=.venv-npu || venv=.venv-npu-$$name; \
	$(NPU_ENV) $$venv/bin/python -m fake_npu.toolkit
NPU_OUT = $(addprefix -,$(filter-out $(NPU_DEFAULT),$(STACK)))

npu-demo: ## the same on the emulated NPU (STACK=NAME: one of `make stacks`)
	$(ON_NPU) recipes/grpo_tiny_cpu/demo.py --steps $(STEPS) --out outputs/npu$(NPU_OUT) $(DEMO_ARGS)

all-stacks: ## both on every stack and a table: outputs/all-stacks.md (STACKS="NAME ...": these; CONTROL=1: stock too)
	$(PYTHON) recipes/grpo_tiny_cpu/all_stacks.py $(if $(STACKS),--only $(STACKS)) $(if $(CONTROL),--control)

# What the two reports were written on with which this project began: a Qwen1.5-MoE of 60 experts at tensor parallel 2.
# vllm-ascend 0.11 takes a share of the device for the KV cache, whatever it is told: hence small devices for smoke.
REPORTS := outputs/reports-stack
# FSDP1: with transformers 4.57 an expert without a token has no gradient, and of two ranks of FSDP2, which reduce each
# parameter by itself, one then waits for the other.
reports-stack: .venv-verl0.7.1-vllm0.11/.ready ## GRPO, smoke, compare: vLLM 0.11.0, vllm-ascend 0.11.0, two devices
	FAKE_CANN_DEVICES=2 $(MAKE) npu-demo STACK=verl0.7.1-vllm0.11 DEMO_ARGS="--tp 2 --out $(REPORTS)/grpo actor_rollout_ref.actor.strategy=fsdp"
	VLLM_CPU_OMP_THREADS_BIND='0|1' $(<D)/bin/ascend-safe smoke --tiny --tp 2 --out $(REPORTS)/cpu
	FAKE_CANN_DEVICES=2 FAKE_CANN_HBM_MB=8192 $(NPU_ENV) .venv-npu-0.11-verl0.7.1/bin/ascend-safe smoke --tiny --tp 2 --out $(REPORTS)/npu
	$(<D)/bin/ascend-safe compare $(REPORTS)/cpu/smoke.json $(REPORTS)/npu/smoke.json --markdown $(REPORTS)/compare.md

r3: setup ## routing replay (R3) against none, on a toy where routing counts: outputs/r3
	$(BIN)/python recipes/routing_replay/ab.py $(R3_ARGS)

npu-r3: ## the same on the emulated NPU: outputs/npu-r3 (FAKE_CANN_DEVICES=2 make npu-r3 R3_ARGS="--tp 2": two devices)
	$(ON_NPU) recipes/routing_replay/ab.py --out outputs/npu-r3$(NPU_OUT) $(R3_ARGS)

stacks: ## the stacks that the demo trains on, and who has them
	@$(PYTHON) requirements/stacks.py list

requirements/stacks/%.txt:
	@echo "there is no stack $*: \`make stacks\` lists those that there are" >&2; exit 2

.venv-%/.ready: requirements/stacks/%.txt
	python=$$($(PYTHON) requirements/stacks.py python $*); $$python -m venv $(@D); \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'; \
	$(@D)/bin/python requirements/stacks.py setup $*; \
	echo $$SECONDS > $@

test: setup lint ## what runs without an accelerator
	$(BIN)/python $(PYTEST) -m "not long" $(PYTEST_ARGS)

long: setup npu-setup ## the same in more forms: an engine that is killed in any state, ten times in one job
	ASCEND_SAFE_KILLS=10 ASCEND_SAFE_STEPS=30 $(BIN)/python -m pytest -m long $(PYTEST_ARGS)
	$(NPU_ENV) FAKE_NPU_STACK=$(STACK) $(NPU_VENV)/bin/python -m pytest tests/npu -m long $(PYTEST_ARGS)

unit: setup ## the quick ones
	$(BIN)/python $(PYTEST) tests/unit $(PYTEST_ARGS)

lint: setup ## ruff, mypy --strict, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In an environment of its own, which takes seconds: what builds the site has nothing to do with torch.
.venv-docs/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/docs.txt
	touch $@

docs: .venv-docs/.ready ## the documents as a site in outputs/site, every link checked
	NO_MKDOCS_2_WARNING=1 $(<D)/bin/mkdocs build --quiet --strict
	$(<D)/bin/python docs/check_links.py outputs/site

# cpu: torch, and what a CUDA build of it brings along, are left out: cpu.overrides.txt pins torch, and which build of that
# version an index offers decides what comes with it.  gpu: Linux on x86-64 and Python 3.11, the usual image.
# npu: for Python 3.11 and 3.12, x86-64 and aarch64; what the image has is left out.
COMPILE = pip compile --quiet --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock'
ifneq ($(filter command environment,$(firstword $(origin STACK))),)
lock: setup
	$(BIN)/python requirements/stacks.py lock $(STACK)
else
lock: setup ## compile requirements/ again (STACK=NAME: the lock of that one of `make stacks`, and no other)
	$(UV) $(COMPILE) --universal --python-version 3.10 --override requirements/cpu.overrides.txt \
		--extra cpu --extra dev pyproject.toml -o requirements/cpu.txt
	sed -i -E '/^(torch|torchvision|torchaudio|torchcodec|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)[= ]/d' requirements/cpu.txt
	$(UV) $(COMPILE) --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--override requirements/gpu.overrides.txt --extra gpu pyproject.toml -o requirements/gpu.txt
	$(UV) $(COMPILE) --universal --python-version 3.11 --generate-hashes \
		$(addprefix --no-emit-package ,torch jinja2 mpmath networkx sympy) \
		--override requirements/npu.overrides.txt --extra npu pyproject.toml -o requirements/npu.txt
	$(UV) $(COMPILE) --universal --python-version 3.10 --generate-hashes requirements/docs.in -o requirements/docs.txt
	$(UV) $(COMPILE) --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--override tests/gpu/overrides.txt pyproject.toml tests/gpu/requirements.in -o tests/gpu/requirements.txt
endif

npu-setup: ## torch-npu and vllm-ascend on a stand-in CANN, in .venv-npu (STACK=0.18: another release)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 was found: set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) emulator/build.py --stack $(STACK) --venv $(NPU_VENV)

npu: npu-setup ## emulator/tests and tests/npu, on that
	$(NPU_ENV) FAKE_NPU_STACK=$(STACK) \
		$(NPU_VENV)/bin/python $(PYTEST) -m "not cluster and not long" emulator/tests tests/npu $(PYTEST_ARGS)

# One process: it makes two nodes, and starts an engine on each.
cluster: setup npu-setup ## GRPO as a job on two Ray nodes (as root), killed and resumed, and on two emulated NPUs
	$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)
	$(NPU_ENV) FAKE_NPU_STACK=$(STACK) $(NPU_VENV)/bin/python -m pytest tests/npu -m cluster $(PYTEST_ARGS)

# With WHEELS=DIR the wheels for the machine with the GPU; there tests/gpu/kit.py runs by itself.
gpu-kit: setup ## the checks of tests/gpu, rehearsed on a CPU (WHEELS=DIR: fetch what a GPU machine needs into DIR)
	$(BIN)/python tests/gpu/kit.py $(if $(WHEELS),fetch --wheels $(WHEELS),run --rehearse) $(KIT_ARGS)

# Beside the environment, not in it: where megatron-core is installed, each process that imports verl imports it too.
megatron: setup ## weight syncs from real Megatron trainers: megatron-core and mbridge on a CPU, minutes
	$(UV) pip install --quiet --no-deps --python $(BIN)/python --target .venv-megatron megatron-core==0.16.1 mbridge==0.15.1
	PYTHONPATH=$(CURDIR)/.venv-megatron $(BIN)/python -m pytest tests/zoo/live_megatron.py $(PYTEST_ARGS)

policy-table: setup ## tests/unit/policy_table.txt again: every decision for each platform and version
	$(BIN)/python tests/unit/policy_table.py

clean: ## remove what was made here
	rm -rf $(VENV) .venv-* outputs dist .pytest_cache .mypy_cache .ruff_cache
