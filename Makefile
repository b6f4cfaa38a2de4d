# `make demo` and `make test` each set up what they need in .venv, and start at once when it is there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Most modules of the packages are never imported, so that none is compiled before it is.
INSTALL := python -m pip install --quiet --no-compile
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)

# The tests run in four processes, two at a time, each on one core: what compiles or simulates Triton's kernels and nvcc's; what
# emulates those in C++, and other programs in C++; in the strict interpreter the battery, the tests of each op and those of the
# interpreter; and all other tests. The longest begin first.
OPS := $(basename $(notdir $(wildcard tests/specs/[!_]*.py)))
COMPILED := $(wildcard tests/test_triton*.py tests/test_cuda_compile.py tests/test_ptx.py)
PROGRAMS := $(wildcard tests/test_cuda*.py tests/test_far_rows.py tests/test_cpu*.py tests/test_gemm.py tests/test_mutants.py)
EMULATED := $(filter-out $(COMPILED),$(PROGRAMS))
INTERPRETED := $(wildcard tests/test_ops*.py $(OPS:%=tests/test_%*.py) tests/test_strict_interpreter*.py)
PROCESSES := test-compiled test-emulated test-others test-interpreted
MARKS := not slow

# Targets that begin with test- expect that all is set up.
.PHONY: demo test $(PROCESSES) verify mutants lint bench gpu budgets clean

# Packages are unpacked while the kernels are compiled.
demo:
	$(MAKE) --jobs=2 $(VENV)/.demo $(VENV)/.native
	python examples/finetune.py

test:
	$(MAKE) --jobs=2 lint $(VENV)/.native
	$(MAKE) --jobs=2 --keep-going --output-sync=target $(PROCESSES)

# Every proof that needs no GPU, the long ones too.
verify:
	$(MAKE) --jobs=2 lint $(VENV)/.native
	$(MAKE) --jobs=2 --keep-going --output-sync=target "MARKS=not short" $(PROCESSES)
	$(MAKE) mutants

$(PROCESSES): export OMP_NUM_THREADS = 1
test-compiled:
	python -m pytest $(COMPILED) -m "$(MARKS)"
test-emulated:
	python -m pytest $(EMULATED) -m "$(MARKS)"
test-interpreted:
	TRITON_INTERPRET=1 python -m pytest $(INTERPRETED) -m "$(MARKS)"
test-others:
	python -m pytest tests $(COMPILED:%=--ignore=%) $(EMULATED:%=--ignore=%) -m "$(MARKS)"

# Plants errors in the kernels; fails if a check doesn't see one.
mutants: $(VENV)/.test,demo,peers $(VENV)/.native
	python -m tests.mutants.run

lint: $(VENV)/.test,demo,peers
	ruff check .

# What each compiled kernel may use, anew: a quarter of an hour of one core.
budgets: $(VENV)/.test,demo,peers
	python -m tests.gpuless.budgets

bench: $(VENV)/.test,demo,peers $(VENV)/.native
	python -m benchmarks.run

# On a machine with an NVIDIA GPU, in the Python environment that is active there; the record goes to the folder OUT.
OUT ?= out
gpu:
	$(PYTHON) -m tests.gpu $(OUT)

clean:
	rm -rf $(VENV) build *.egg-info fastadapt/*.so

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=77" wheel ninja numpy
	$(INSTALL) "$(TORCH)"
	touch $@

# The package itself, editable, and the extras that the stamp is named after.
$(VENV)/.%: pyproject.toml $(VENV)/.torch
	FASTADAPT_BUILD=none $(INSTALL) --no-build-isolation --editable ".[$*]"
	touch $@

$(VENV)/.native: $(SOURCES) $(VENV)/.torch
	env -u MAKEFLAGS python setup.py --quiet build_ext --inplace  # ninja would take the jobs of make for its own
	touch $@
