# make setup | quickstart | lift | test | test-all | test-net | check | chaos      (Linux, Python 3.11, no GPU needed)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup quickstart lift test test-slow test-all test-net check chaos

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; try: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/ray-app quickstart

# The quickstart in a new folder; fails unless its adapter beats the best baseline.
lift: setup
	folder=$$(mktemp -d) && $(BIN)/ray-app quickstart --out $$folder --tracking-uri sqlite:///$$folder/mlflow.db --json > $$folder/result.json \
	&& $(BIN)/python -c 'import json, sys; result = json.load(sys.stdin)["evaluate"]; print(result["verdict"]); sys.exit(result["lift"] <= 0)' < $$folder/result.json

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# At most 8 minutes on 2 quiet cores: unit and integration tests. A file stays in one process, so that its fixtures are
# made once; in the order of names, in which the long integration tests come before the short unit tests.
test: check
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# What `make test` leaves out.
test-slow: setup
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

# Links need root, iproute2 and a kernel with network namespaces, veth and bridges (netem for delay); about 15 minutes.
test-net: setup
	$(BIN)/python -m pytest tests/net --timeout 900 -s

chaos: setup
	$(BIN)/python -m benchmarks.train.chaos --folder $$(mktemp -d)/chaos
