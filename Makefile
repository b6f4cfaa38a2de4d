# `make demo` and `make test` each set up what they need in .venv, and start at once when it is there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)

# Files whose tests run once more in the strict interpreter: the battery, those of one op, those of the interpreter.
OPS := $(basename $(notdir $(wildcard tests/specs/[!_]*.py)))
INTERPRETED := $(wildcard tests/test_ops*.py $(OPS:%=tests/test_%.py) tests/test_strict_interpreter*.py)

.PHONY: demo test verify mutants lint bench gpu budgets clean

demo: $(VENV)/.demo $(VENV)/.native
	python examples/finetune.py

test: lint $(VENV)/.native
	python -m pytest tests
	TRITON_INTERPRET=1 python -m pytest $(INTERPRETED)

# Every proof that needs no GPU, the long ones too.
verify: lint $(VENV)/.native
	python -m pytest tests -m "slow or not slow"
	TRITON_INTERPRET=1 python -m pytest $(INTERPRETED) -m "slow or not slow"
	$(MAKE) mutants

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
	python -m pip install --quiet "setuptools>=77" wheel ninja numpy
	python -m pip install --quiet "$(TORCH)"
	touch $@

# The package itself, editable, and the extras that the stamp is named after.
$(VENV)/.%: pyproject.toml $(VENV)/.torch
	FASTADAPT_BUILD=none python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

$(VENV)/.native: $(SOURCES) $(VENV)/.torch
	python setup.py --quiet build_ext --inplace
	touch $@
