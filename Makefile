# make demo      the whole surgery on the bundled tiny model; prints the path of report.html
# make test      the tests
# make test-changed  those that uncommitted changes can touch, in about two minutes
# make soak      hundreds of runs killed or disturbed by real faults, and resumed; takes about an hour
# make rehearsal the commands at the true size of Wan2.1 1.3B, with random weights, in under an hour and 16 GiB
# make lint      ruff and pyright
# make kernels   attention at every shape of its tests' grid, of every config on TPUs and on every mesh; takes hours
# make evidence  the tables of the README, re-run; takes hours
# make ablations the tables of docs/results.md but families, re-run; takes hours
# make families  the table of families in docs/results.md and the teacher that it needs, re-run; takes six hours
# make tables    the same tables from the measurements in docs/ablations, and what is missing there
# make gpu-evidence  kernels, attention and whole models measured on one GPU in MINUTES (10), without installing anything
# make fuzz      every reader on files changed at random, ten minutes each; takes hours
# make notebooks docs/notebooks, the notebooks run and rendered; takes a quarter of an hour
# make picture   docs/comparison.gif, from a longer surgery than the demo's; takes half an hour
# make wheel     the wheel, in dist/
# make docs      docs/ as a site in build/docs, with warnings as errors
# make docs-links  the same, and asks every external address that it links to
#
# Each sets up .venv by itself, with the first Python of 3.11 to 3.13 that it finds, or with PYTHON=...

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo "$$p"; break; }; done)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt
# Only the tests need torch, and any build of it does. To save CUDA's gigabytes, name an index of CPU wheels:
# make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Two processes of one thread each: tests compile more than they compute, and compilers use one core.
ONE_THREAD := XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1
# A file's tests in one process, which builds what they share once; in the order of tests/conftest.py.
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder

# The tests start a hundred processes, which should not each compile the same modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-changed soak rehearsal lint fuzz kernels evidence ablations families tables gpu-evidence notebooks docs docs-links picture wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/base.stamp
	$(BIN)/jsurgery surgery --config=tiny --workdir=runs/demo

test: $(VENV)/test.stamp
	$(ONE_THREAD) $(BIN)/python -m pytest $(BY_FILE) --durations=5

test-changed: $(VENV)/test.stamp
	$(ONE_THREAD) $(BIN)/python -m pytest $(BY_FILE) -p tests.changed --minutes=1

soak: $(VENV)/test.stamp
	$(ONE_THREAD) $(BIN)/python -m tests.faults.soak

rehearsal: $(VENV)/test.stamp
	$(BIN)/python -m tests.full_size.rehearse runs/rehearsal

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fuzz: $(VENV)/test.stamp
	$(ONE_THREAD) $(BIN)/python tests/faults/fuzz.py all --minutes=10

kernels: $(VENV)/test.stamp
	FULL_GRID=1 $(ONE_THREAD) $(BIN)/python -m pytest -n 2 tests/pallas_kernels tests/wan/test_sharded_model.py \
		tests/surgery/distillation/test_sharded.py tests/runtime/test_processes.py tests/surgery/test_phases.py \
		tests/wan/test_weights.py tests/export/test_jax_reference.py

evidence: $(VENV)/base.stamp
	$(BIN)/jsurgery ablate --table=evidence --config=tiny_evidence --workdir=runs/evidence --results=docs/results.md

ablations: $(VENV)/base.stamp
	$(BIN)/jsurgery ablate --table=all --config=tiny_ablations --workdir=runs/ablations --results=docs/results.md

families: $(VENV)/base.stamp
	$(BIN)/jsurgery train --config=tiny_families_teacher --workdir=runs/families_teacher
	$(BIN)/jsurgery ablate --table=families --config=tiny_families --workdir=runs/families --results=docs/results.md

tables: $(VENV)/base.stamp
	$(BIN)/jsurgery ablate --table=all --config=tiny_ablations --workdir=runs/tables --measurements=docs/ablations --results=docs/results.md

# Nothing can be installed on many a machine with a GPU: any Python with jax, flax, optax, ml-collections and torch does.
EVIDENCE_PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
MINUTES ?= 10

gpu-evidence:
	$(EVIDENCE_PYTHON) -m jsurgery.bench.gpu_evidence --minutes=$(MINUTES) --output=runs/gpu_evidence

notebooks: $(VENV)/notebooks.stamp
	$(BIN)/python notebooks/render.py docs/notebooks

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

docs-links: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx --builder linkcheck docs build/links

picture: $(VENV)/base.stamp
	$(BIN)/jsurgery surgery --config=tiny_evidence --workdir=runs/picture --config.data.two_sprites=0.0 \
		--config.evaluate.prompts=24 --config.evaluate.videos=24
	cp runs/picture/comparison.gif docs/comparison.gif

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir=dist .

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11, 3.12 or 3.13; none found on PATH. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "make: PYTHON=$(PYTHON): expected Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@if "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then "$(PYTHON)" -m venv --clear $(VENV); \
	elif "$(PYTHON)" -c 'import venv, pip' 2>/dev/null; then \
		"$(PYTHON)" -m venv --clear --without-pip $(VENV) && "$(PYTHON)" -m pip --quiet --python $@ install pip; \
	else echo "make: $(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; fi

$(VENV)/base.stamp: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo 'Installing what jsurgery needs into $(VENV) (1 GB; once)'
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	@echo 'Installing what the tests need into $(VENV) (5 GB more; once)'
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps) torch
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/notebooks.stamp: $(VENV)/base.stamp
	@echo 'Installing what the notebooks need into $(VENV) (3 GB more; once)'
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps) torch
	$(PIP_INSTALL) --editable '.[export,notebooks]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/base.stamp
	@echo 'Installing what the site needs into $(VENV)'
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@
