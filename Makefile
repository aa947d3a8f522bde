# `make train` and `make test` do all the set-up they need; everything lands in .venv.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# One process per GPU; four processes on a machine without any.
NUM_GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c . | sed 's/^0$$/4/')
MASTER_PORT ?= 29500
CONFIG ?= ds_config_examples/zero2_slow_network.json
ARGS ?=
# A virtual environment of the oldest versions, and the tests that run there.
OLDEST := .venv-oldest
TELLING := tests/rules tests/comm tests/sync tests/shards tests/export tests/integration/test_truth.py \
	tests/integration/test_publish.py tests/integration/test_resume.py tests/test_hf_trainer.py
# The Python of the machine with a GPU, and what may be missing there.
GPU_PYTHON ?= 3.12
GPU_PACKAGES ?= pydantic hjson
# The example has two particles; with an odd number of GPUs the built-in config makes each GPU one.
WITH_CONFIG = $(if $(and $(filter file,$(origin CONFIG)),$(filter %1 %3 %5 %7 %9,$(NUM_GPUS))),,--deepspeed_config $(CONFIG))

# The deepspeed launcher and DeepSpeed's own builds look for python and ninja on PATH.
export PATH := $(BIN):$(PATH)

.PHONY: help train test coverage test-slow test-versions gpu-check gpu-wheels lint docs clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

train: $(VENV)/.installed ## Train a small Llama with a swarm of ZeRO particles (about three minutes on two cores)
	deepspeed --num_gpus $(NUM_GPUS) --master_port $(MASTER_PORT) ds_pso/train.py $(WITH_CONFIG) $(ARGS)

test: $(VENV)/.installed lint ## Lint, types and the default test suite
	pytest -m "not slow" $(ARGS)

coverage: $(VENV)/.installed ## The default test suite with coverage; takes twice as long
	pytest -m "not slow" --cov --cov-report=term $(ARGS)

test-slow: $(VENV)/.installed ## The tests that take minutes
	pytest -m slow $(ARGS)

test-versions: $(OLDEST)/.installed ## The oldest versions that pyproject.toml allows, and the tests that see most of them
	$(CURDIR)/$(OLDEST)/bin/python -m pytest -m "not slow" $(TELLING) $(ARGS)

gpu-check: ## Try everything on a GPU, in eight minutes; the table: runs/gpu_check.md
	$(if $(wildcard $(BIN)/python),python,python3) tests/gpu_check.py $(ARGS)

gpu-wheels: $(VENV)/.installed ## What gpu-check needs beside torch and transformers, to take to another machine
	rm -rf gpu_wheels
	DS_BUILD_OPS=0 python -m pip wheel -q --no-deps --no-build-isolation -w gpu_wheels \
		"deepspeed==$$(python -c 'from importlib.metadata import version; print(version("deepspeed"))')"
	python -m pip download -q -d gpu_wheels --only-binary :all: --python-version $(GPU_PYTHON) \
		$(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64 $(GPU_PACKAGES)
	du -sh gpu_wheels

lint: $(VENV)/.installed ## What pre-commit runs: ruff and mypy
	pre-commit run --all-files

docs: $(VENV)/.installed ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

$(VENV)/.installed: pyproject.toml launcher/install.sh
	launcher/install.sh $(VENV)

$(OLDEST)/.installed: pyproject.toml launcher/install.sh
	launcher/install.sh $(OLDEST) oldest

clean: ## Remove the virtual environment and caches; run folders stay
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build site *.egg-info
