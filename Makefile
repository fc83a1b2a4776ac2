# One target per developer action; `make help` lists them. Everything that is made lies in build/, but for the compiled modules, which
# stand beside their sources so that the tree runs as it is.
#
# PYTHON      the Python to use. Not given: that of the active virtual environment; else python3, if it has all that is needed; else
#             a virtual environment of our own, build/venv.
# LAPSE_BUILD release (default), debug, asan or tsan: see setup.py
# ARGS        more arguments for pytest, e.g. make test ARGS="-k store -x"; ARGS="-k store --pdb" and -s run in one process
# TEST_PROCESSES how many processes run tests at once (default: one more than there are cores, since tests wait a lot); 0: no others

MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := $(CURDIR)/build/venv
ifndef PYTHON
  ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
    PYTHON := python
  else
    PYTHON := $(shell python3 tools/environment.py check build run dev 2>/dev/null && echo python3 || echo $(VENV)/bin/python)
  endif
endif
# The interpreter itself, not a wrapper around it; VENV's may not exist yet.
override PYTHON := $(or $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null),$(abspath $(PYTHON)))
LAPSE_BUILD ?= release
export LAPSE_BUILD
export LAPSE_WERROR = 1

# Programs: what has a __main__ part. A program's compiled kernels are in the folder that is named for it below.
programs = $(notdir $(basename $(shell grep -ls __main__ $(1))))
APPS := $(call programs,apps/*.py)
TESTS := $(call programs,tests/cluster/*.py)
KERNELS := $(sort $(patsubst %/,%,$(dir $(wildcard apps/*/*.pyx tests/*/*.pyx benchmarks/*.pyx))))
stamp = build/stamps/$(subst /,-,$(1))
kernels = $(if $(filter $(1),$(KERNELS)),$(call stamp,$(1)))

.PHONY: locks leaks
