# make demo   a virtual environment, the library, and everything there is to see (files land in demo/)
# make test   what CI runs: format, lint, types, tests, one smoke run of every benchmark
#
# Which torch: a plain `torch` on Linux is the CUDA build of several gigabytes. On a machine without a GPU:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
TORCH_INDEX ?=
OUT ?= demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint build format clean

demo: $(VENV)/.demo
	$(BIN)/pixnerd info
	$(BIN)/pixnerd verify
	$(BIN)/pixnerd fit china --out $(OUT)
	$(BIN)/pixnerd train --data mnist --out $(OUT)/mnist --sample-every 0 \
		$(if $(wildcard $(OUT)/mnist/checkpoint.safetensors),--resume)
	for size in 28 112; do $(BIN)/pixnerd sample $(OUT)/mnist/checkpoint.safetensors \
		--n 40 --columns 10 --size $$size --out $(OUT)/digits-$$size.png || exit 1; done
	$(BIN)/python -m benchmarks ops --quick --accept compile --case 'neural_field_mlp-plain*' --out $(OUT)
	@echo "Look at:" && ls -1 $(OUT)/*

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest benchmarks --benchmark-disable-gc --benchmark-warmup=off

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*

build: $(VENV)/.installed

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(PIP) "setuptools>=77" cmake ninja pybind11
	touch $@

# The core is compiled in build/, which survives: a second build compiles only what changed.
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[dev]"
	touch $@

# The demo needs no compiler tools, linters or foreign models beside it.
$(VENV)/.demo: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[cli,bench]"
	touch $@

clean:
	rm -rf build .venv demo pixnerd_kernels/_native*
