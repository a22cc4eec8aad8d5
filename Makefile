# make demo   runs the whole pipeline on real digits and prints its table
# make test   lint, types, import contract and the whole test suite
# make test-long   every seed of the campaigns (kills, fuzz), of which CI runs a few; their log is docs/test-long.log
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/rectify run configs/digits/pipeline.yaml $(RUN)

test: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadscope --no-loadscope-reorder --durations 15

test-long: .venv/installed
	rm -f docs/test-long.log
	$(BIN)/pytest --long tests/fuzz tests/distributed/test_kills.py tests/distributed/test_hosts.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs dist build

.PHONY: demo test test-long clean
