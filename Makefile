# Needs make and Python 3.11 or newer with its venv module; everything else comes from requirements.lock.
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name))))
BIN := .venv/bin
WORKERS ?= 2 # test files at once; most tests wait for time to go by
PROTOC := $(BIN)/python -m grpc_tools.protoc --plugin=$(BIN)/protoc-gen-mypy -I kvstore/pb=protos
.PHONY: run test test-postgres venv verify verify-proto fix proto lock test-compat test-kube sim bench test-bench

run: venv
	$(BIN)/kvstore serve --data-dir ./data

test: venv
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not postgres"

test-postgres: venv
	$(BIN)/pytest -m postgres

sim: venv
	SIM_SEEDS=$${SIM_SEEDS:-100000} $(BIN)/pytest tests/test_sim.py --override-ini faulthandler_timeout=0

venv: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

verify: venv verify-proto
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest --quiet tests/test_tidy.py

verify-proto: venv
	rm -rf build/proto && mkdir -p build/proto
	$(PROTOC) --python_out=build/proto --mypy_out=quiet:build/proto protos/*.proto
	diff -r -x __init__.py -x __pycache__ build/proto/kvstore/pb kvstore/pb

fix: proto
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: venv
	$(PROTOC) --python_out=. --mypy_out=quiet:. protos/*.proto

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	build/lock/bin/uv pip compile pyproject.toml --all-extras --universal --generate-hashes \
		--custom-compile-command "make lock" --quiet -o requirements.lock $(LOCK)

test-compat: venv
	tests/compat/run

test-kube: venv
	tests/kube/run

bench: venv
	$(BIN)/kvstore-bench gate bench/gates/xs.yaml --out build/bench/$$(date +%Y%m%d-%H%M%S)

test-bench: venv
	$(BIN)/kvstore-bench gate bench/gates/ci.yaml --out build/bench/$$(date +%Y%m%d-%H%M%S)
	$(BIN)/kvstore-bench gate bench/gates/shards.yaml --out build/bench/$$(date +%Y%m%d-%H%M%S)-shards
