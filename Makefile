# Every target makes .venv on first use; a second call installs nothing.
PYTHON ?= python3
# Which DALI: `dali` is built for CUDA 13, `dali-cuda120` for CUDA 12. Either runs without a GPU.
EXTRAS ?= dali,dev
NPROC ?= $(shell nvidia-smi -L 2>/dev/null | grep -c . | sed 's/^0$$/2/')
RUN_DIR ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
# Files of tests that run at one time; 0 runs them in this process, as a debugger needs.
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: train test test-all dist release-check constraints lint format docs bench bench-gpu clean

train: $(STAMP) ## train the digits recipe with LE-SAM on all GPUs, or on two CPU processes
	PATH="$(CURDIR)/$(BIN):$$PATH" NPROC_PER_NODE=$(NPROC) launch/torchrun.sh --config digits --run_dir $(RUN_DIR) $(ARGS)

test: $(STAMP) ## every behaviour
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not full" $(ARGS)

test-all: test ## and the combinations that `test` leaves out
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m full $(ARGS)

dist: $(STAMP) ## build the sdist and the wheel into dist/, and try them as a user who has installed them
	rm -rf dist
	$(BIN)/python -m build -C--global-option=--quiet # setuptools: errors alone, not each file
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest tests/packaging/check_dist.py

release-check: dist ## and install the wheel with pip into an environment of its own, and the README's first commands there
	$(BIN)/python -m pytest tests/packaging/check_release.py

constraints: $(STAMP) ## write down the versions that are installed here, for installs that can be repeated
	sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/pip freeze --disable-pip-version-check --exclude-editable >> constraints.new
	mv constraints.new constraints.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## the site of the documentation, into build/site; a link or an anchor that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # --quiet would hide warnings from `strict` too

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the optimizer's share of a step, against other implementations, on this machine
	$(BIN)/python benchmarks/kernels.py $(ARGS)

bench-gpu: $(STAMP) ## GPU tests and all GPU benchmarks, in under 27 minutes; ARGS="--only first" takes 9
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .triton

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@
