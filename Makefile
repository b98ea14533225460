# Everything is built in .venv; nothing is needed before but Python 3.10 or newer, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest diffusers that is supported, in an environment of its own, and the tests that need no network it hasn't yet.
OLDEST := .venv-oldest
CORE := $(patsubst %,tests/test_%.py,ab calibrate cli clock correct coverage dbcache delta_dit discovery distributed ecosystem engine \
	faults_of_peers fora forecast model_based numbers pab pipeline plan promises schedulers scheduler_clock smoothcache table \
	taylorseer teacache time_shift toca two_denoisers versions ways_of_calling wrong_anatomy)

.PHONY: install demo test test-all test-oldest lint format bench evidence docs build release-check clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow or not slow"

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist worksteal --oldest $(CORE) -k "not use_flow_sigmas-flow_shift"

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	awk -F== 'NR == FNR { old[$$1] } NR == FNR || !($$1 in old)' constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e ".[demo,yaml]" \
		ftfy hypothesis peft psutil pytest pytest-timeout pytest-xdist transformers
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/sostenuto bench --suite efficiency --threads 2 --output runs/bench --json runs/bench/efficiency.json

evidence: install
	$(BIN)/sostenuto demo --output runs/evidence --num-images 10000 --batch-size 100 --seeds 0 1 2 --search-images 0 --dtype bfloat16 --json docs/results/demo-10k.json

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: install
	$(BIN)/python -m hatchling build

release-check: install
	$(BIN)/python scripts/release_check.py

clean:
	rm -rf $(VENV) $(OLDEST) demo-output runs dist
