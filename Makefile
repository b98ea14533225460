# Everything is built in .venv; nothing is needed before but Python 3.10 or newer, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all lint format bench evidence docs build release-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/sostenuto demo --fresh --output demo-output --json demo-output/demo.json

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "slow or not slow"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/sostenuto bench --suite efficiency --threads 2 --output runs/bench --json docs/results/efficiency.json

evidence: install
	$(BIN)/sostenuto demo --output runs/evidence --num-images 10000 --batch-size 100 --seeds 0 1 2 --search-images 0 --dtype bfloat16 --json docs/results/demo-10k.json

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: install
	$(BIN)/python -m hatchling build

release-check: install
	$(BIN)/python scripts/release_check.py

clean:
	rm -rf $(VENV) demo-output runs dist
