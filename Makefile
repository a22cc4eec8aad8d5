# make demo   runs the whole pipeline on real digits and prints its table
# make test   lint, types, import contract and the tests
# make test-slow   kills, lost hosts, damaged files (a few seeds of each), whole pipelines in short, all commands of the docs
# make test-service   a real Slurm on this machine (root; apt-get install slurm-wlm munge); skips where it is absent
# make test-long   every seed of these; their log is docs/test-long.log
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/rectify run configs/digits/pipeline.yaml $(RUN)

test: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 -m "not slow and not service" --dist loadscope --no-loadscope-reorder --durations 15

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 -m slow

test-service: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile -m service tests/launch

test-long: .venv/installed
	rm -f docs/test-long.log
	$(BIN)/pytest --long -m slow tests/distributed tests/fuzz

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs dist build

.PHONY: demo test test-slow test-service test-long clean
