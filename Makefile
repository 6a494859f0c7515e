# `make demo` and `make test` are all that a fresh machine with Python 3.10+ needs to run: each
# makes .venv when it is missing. Nothing is compiled.
#
#   PYTHON  the Python that .venv is made from
#   TORCH   the torch to install, for example TORCH=torch for the newest
#   SECOND  another Triton that the kernels are compiled with, besides the one that torch brings
#   CONSTRAINTS  a file of exact versions, with older.txt in its folder; that of continuous
#                integration is .ci/constraints.txt
#   PYTEST  more options for pytest, for example PYTEST="-k stream -x"

PYTHON ?= python3
TORCH  ?= torch==2.13.0
SECOND ?= 3.6.0
PYTEST ?=
CONSTRAINTS ?=
VENV   ?= .venv

PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
OTHER := $(VENV)/triton-$(SECOND)
OWN   := $(VENV)/transformers-tests
OLDER := $(VENV)/older
OLD   := $(VENV)-oldest

# One thread a worker: the suite runs two workers, and its tensors are too small to split.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all older oldest check format verify mutants fuzz static machine bench docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

# torch comes first: the later, open range is then satisfied, and no other build replaces it.
$(READY): setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
	touch $@

# Only the package itself: first on PYTHONPATH it takes the other's place, torch and all else stay.
$(OTHER): | $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $@.part "triton==$(SECOND)"
	mv $@.part $@

# transformers' own tests of a model, of the release that is installed: no wheel holds them.
RELEASE = $(shell $(PY) -c 'from importlib.metadata import version; print(version("transformers"))')
$(OWN): $(READY)
	rm -rf $@ $@.part
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--no-binary transformers --dest $@.part "transformers==$(RELEASE)"
	tar -xzf $@.part/transformers-$(RELEASE).tar.gz -C $@.part --strip-components 1 \
		transformers-$(RELEASE)/tests
	rm $@.part/*.tar.gz
	mv $@.part $@
	touch $@

# The lower bounds that setup.py gives: torch 2.9 brings Triton 3.5.
oldest_of = $(1)==$(shell sed -nE 's/.*"$(1)>=([0-9.]+)".*/\1/p' setup.py).*
$(OLDER): | $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --target $@.part \
		"triton==3.5.*" "$(call oldest_of,transformers)" \
		$(if $(CONSTRAINTS),--constraint $(dir $(CONSTRAINTS))older.txt)
	mv $@.part $@

demo: $(READY) ## Train a small byte-level model and watch its memory learn while it reads
	$(PY) -m titans_kernels.demo

test: check $(OTHER) $(OWN) $(OLDER) ## Lint, type-check and run every test that this machine can run
	SECOND_TRITON=$(abspath $(OTHER)) TRANSFORMERS_TESTS=$(abspath $(OWN)) $(ONE_THREAD) \
		$(PY) -m pytest -n 2 --dist worksteal --durations 10 $(PYTEST)
	$(if $(PYTEST),,$(MAKE) older)

older: $(OLDER) ## The core of the tests with the oldest Triton and transformers, the torch at hand
	PYTHONPATH=$(abspath $(OLDER)) $(ONE_THREAD) $(PY) -m pytest -q -n 2 --dist worksteal \
		$(patsubst %,tests/test_%.py,kernels models cache replace loss sessions)

test-all: $(READY) ## The longer runs and wider sweeps that `make test` leaves out
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal -m wide $(PYTEST)

CORE := reference memory ops streaming states nonfinite layer layer_module blocks models cache replace loss sessions
oldest: ## The same with the oldest torch too (gigabytes), without kernels, and more of the core
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check \
		"$(call oldest_of,torch)" "$(call oldest_of,transformers)" \
		numpy omegaconf tqdm hypothesis pytest tokenizers peft
	PYTHONPATH=. $(ONE_THREAD) $(OLD)/bin/python -m pytest -q -k "not triton" $(PYTEST) \
		$(CORE:%=tests/test_%.py)

check: $(READY) ## Lint, formatting and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## Rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

verify: $(READY) ## Compare every operator and dtype with the float64 reference
	$(PY) -m titans_kernels.verify

mutants: $(READY) ## Plant every fault of tests/mutants in the sources: each must turn a test red
	PYTHONPATH=tests $(ONE_THREAD) $(PY) -m mutants --processes 2 --unplanted

fuzz: $(READY) ## Compare 2,000 random calls of each kind with the definition, other ones each time
	FUZZ=2000 $(ONE_THREAD) $(PY) -m pytest -n 2 --dist load tests/test_fuzz.py

static: $(READY) $(OTHER) ## Compile the shipped kernels for every GPU and judge their machine code
	$(PY) -m benchmarks.machine_code.static --check
	$(PY) -m benchmarks.machine_code.static --check --arch sm_90 --head-dim 64 --depth 3 4
	PYTHONPATH=$(OTHER) $(PY) -m benchmarks.machine_code.static --check

EXECUTE := PYTHONPATH=.:tests $(ONE_THREAD) $(PY) -m triton_support.machine
EXECUTE_OTHER := PYTHONPATH=$(OTHER):.:tests $(ONE_THREAD) $(PY) -m triton_support.machine
EXECUTED := benchmarks/results/machine.jsonl
machine: $(READY) $(OTHER) ## Execute the kernels' PTX without a GPU (half an hour): docs/machine.md
	for arch in sm_80 sm_90; do $(EXECUTE).proof --arch $$arch && $(EXECUTE).step --arch $$arch || exit 1; done
	$(EXECUTE_OTHER).proof --arch sm_80
	for arch in sm_80 sm_90; do $(EXECUTE) --arch $$arch || exit 1; done > $(EXECUTED).part
	for arch in sm_80 sm_90; do $(EXECUTE_OTHER) --arch $$arch --cases second || exit 1; done >> $(EXECUTED).part
	for arch in sm_80 sm_90; do $(EXECUTE).counts --arch $$arch --case "D 64, counted" || exit 1; done >> $(EXECUTED).part
	mv $(EXECUTED).part $(EXECUTED)
	$(EXECUTE).table

bench: $(READY) ## Time the operators and their peers
	$(PY) -m benchmarks

docs: $(READY) ## Build the documentation into site/, with the API reference
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean: ## Remove .venv, caches and build products
	rm -rf $(VENV) $(OLD) build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
