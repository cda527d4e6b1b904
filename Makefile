# `make demo` and `make test` are all a fresh clone needs; both make .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
parallel := --numprocesses 2 --dist worksteal
.PHONY: demo test test-nbs test-py coverage test-all mutants export tutorials check docs docs-check clean

demo: .venv/installed
	$(BIN)/rkd demo

test: test-nbs test-py

test-nbs: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

test-py: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(parallel)

# test-py, and which lines it leaves out
coverage: .venv/dev
	rm -rf build/coverage && mkdir -p build/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(parallel)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# all that .ci/run asks for, and what is slow
test-all: check coverage .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --flags slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not cuda"

# does a test fail for every operator that is wrong?
mutants: .venv/dev
	$(BIN)/python tools/mutate.py

# notebooks -> modules, index.ipynb -> README.md; clean first, as modules name the ids of cells, which some editors do not write
export: .venv/dev
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tools/readme.py

# run the tutorials and store what they show
tutorials: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test nbs/tutorials --save --n-workers 2
	$(BIN)/nbdev-clean

# are notebooks, modules and README in step, do imports point down, is no line too long?
check: .venv/dev
	$(BIN)/python tools/check.py
	$(BIN)/lint-imports
	$(BIN)/ruff check

# the site in _docs, from notebooks and Markdown pages
docs: .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/docs.py

# opens every page in headless Chromium, which has to be installed
docs-check: docs
	$(BIN)/python tools/site_check.py _docs

.venv/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	touch $@

.venv/installed: .venv/uv settings.ini setup.py pyproject.toml rkd_fastai/__init__.py
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info _proc _docs
