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
.PHONY: all ps apps tests kernels test packaging seed check sim sim-faults soak faults faults-quick fuzz fuzz-quick strangers demo docs model bench lint asan tsan coverage mutants dev wheel wheels clean help FORCE

all: ps apps tests                 ## the core, all applications, all test programs (the default)

ps: build/stamps/lapse             ## the core: lapse/

apps: $(APPS:%=build/apps/%)       ## all applications; one of them: make apps/simple, which writes build/apps/simple

tests: $(TESTS:%=build/tests/%)    ## all test programs; one of them: make tests/<name>, which writes build/tests/<name>

# What `auto` means, and which tests stay in one process, is in tests/conftest.py.
TEST_PROCESSES ?= auto
PYTEST = "$(PYTHON)" -m pytest -n $(TEST_PROCESSES)

test: all kernels build/stamps/environment-dev   ## run the tests
	$(PYTEST) --ignore=tests/packaging $(ARGS)

packaging: all kernels build/stamps/environment-dev   ## run the tests of the sdist, the wheel, and of every command in the README
	$(PYTEST) tests/packaging $(ARGS)

seed: build/stamps/environment-dev     ## run the commands of the README on a clean clone, and check what they print
	@"$(PYTHON)" tools/seed.py $(ARGS)

# The stages of `make check`, in the order in which they begin, CHECKS_AT_ONCE at a time; the long ones come first.
CHECKS = lint test seed packaging faults-quick model fuzz-quick
CHECKS_AT_ONCE ?= 2
check: all kernels build/stamps/environment-dev   ## all that a change must pass: lint, the model, build, tests, a tenth of the faults, packaging, the seed
	@"$(PYTHON)" tools/check.py --at-once $(CHECKS_AT_ONCE) $(CHECKS)

SEEDS ?= 1-20000
sim: build/stamps/lapse build/stamps/environment-dev   ## run schedules of the simulation, and print the record (SEEDS=1-1000000)
	@"$(PYTHON)" -m lapse.testing --seeds $(SEEDS) --processes $$(nproc) $(ARGS)

sim-faults: build/stamps/lapse build/stamps/environment-dev   ## put each fault into the simulation, and print what finds it
	@"$(PYTHON)" -m lapse.testing faults $(ARGS)

soak: tests kernels                ## check the histories of real clusters for half an hour, and print the record (ARGS="--pulls 100000000")
	@"$(PYTHON)" tests/soak.py $(ARGS)

faults: build/stamps/lapse         ## kill, freeze and cut nodes of real jobs at random instants, and print the table (ARGS="--scale 0.1")
	@"$(PYTHON)" tests/faults $(ARGS)

# In `make check`: four times the limits, since other stages run beside it.
faults-quick:
	@$(MAKE) --silent --no-print-directory faults ARGS="--scale 0.1 --patience 4"

coverage: build/stamps/lapse build/stamps/environment-dev   ## which lines and branches of the protocol the simulation comes by
	@"$(PYTHON)" tools/coverage.py $(ARGS)

mutants: build/stamps/lapse build/stamps/environment-dev   ## change the protocol in one place at a time, and see what notices (ARGS="--every 40")
	@"$(PYTHON)" tools/mutants $(ARGS)

EXECUTIONS ?= 10000000
SEED ?= 1
fuzz: kernels build/stamps/environment-dev     ## fuzz what a node does with frames, with clang (EXECUTIONS=10000000 SEED=1)
	@"$(PYTHON)" tools/fuzz.py --executions $(EXECUTIONS) --seed $(SEED) $(ARGS)

fuzz-quick: kernels build/stamps/environment-dev       # a part of `make check`
	@"$(PYTHON)" tools/fuzz.py --executions 200000 --seconds 20 --if-possible $(ARGS)

SHOTS ?= 1000000
TRAITORS ?= 200
PACE ?= 2000
strangers: kernels build/stamps/environment-dev    ## handshakes and frames of strangers and traitors at running jobs (SHOTS=1000000 TRAITORS=200 PACE=2000)
	@"$(PYTHON)" tests/strangers.py --shots $(SHOTS) --traitors $(TRAITORS) --pace $(PACE) --calls 600 --rounds 40 $(ARGS)

demo:                              ## fetch MovieLens 100K, factorize it on 2 local nodes, draw the course (build/demo/demo.png)
	@echo "demo: building what is not built yet (about a minute on a fresh machine)" >&2
	@$(MAKE) --silent --no-print-directory build/apps/matrix_factorization >&2
	@echo "demo: looking for matplotlib and tqdm, for the plot and the progress bar" >&2
	@PIP_RETRIES=1 "$(PYTHON)" tools/environment.py install apps >build/demo.log 2>&1 || true
	@"$(PYTHON)" apps/mf/demo.py $(ARGS)

docs: build/stamps/lapse build/stamps/environment-docs     ## make a site of the documentation (build/site/index.html)
	rm -rf build/site
	build/docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --conf-dir docs --doctree-dir build/docs/pages . build/site
	@echo "the site: build/site/index.html"

model:                             ## check the model of the protocol in verify/, which needs spin (FULL=1: hours)
	"$(PYTHON)" verify/check.py $(if $(FULL),--full) $(ARGS)

bench: all kernels                 ## run the benchmarks (ARGS="--quick": see python -m benchmarks --help)
	"$(PYTHON)" -m benchmarks $(ARGS)

lint: build/stamps/environment-dev     ## check the sources
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" tools/lint.py

asan: export PYTHONMALLOC = malloc
asan: export UBSAN_OPTIONS = print_stacktrace=1
asan: build/stamps/environment-dev     ## run unit tests, simulation and jobs under AddressSanitizer and UndefinedBehaviorSanitizer, in build/asan
	$(call sanitize,asan,ASAN_OPTIONS,detect_leaks=0,)

tsan: build/stamps/environment-dev     ## the same under ThreadSanitizer, in build/tsan
	$(call sanitize,tsan,TSAN_OPTIONS,die_after_fork=0 exitcode=66,suppressions=$(CURDIR)/tests/tsan.supp)

locks: all build/stamps/environment-dev    ## take out each lock, one at a time, and see that a test fails (ARGS="6 channel")
	@"$(PYTHON)" tools/locks.py $(ARGS)

leaks: tests kernels build/stamps/environment-dev   ## see that 10^6 operations of each kind leave nothing behind, on one node and two (ARGS="-n 100000")
	build/tests/leaks -n 1000000 $(ARGS)
	"$(PYTHON)" -m lapse run -s 2 build/tests/leaks -n 1000000 $(ARGS)
	for scheme in naive preloc local; do \
	    "$(PYTHON)" -m lapse run -s 2 build/tests/leaks -n 1000000 --only sample --scheme $$scheme $(ARGS) || exit 1; done

dev: build/stamps/environment-dev      ## install what only some tests use: torch and gensim (TORCH=torch==2.13.0)
	"$(PYTHON)" -m pip install --quiet $(or $(TORCH),torch) "gensim>=4.3"

wheel: build/stamps/environment-dev    ## make the sdist and, from it, a wheel for this Python, and try it (in dist/)
	"$(PYTHON)" tools/wheels.py --python "$(PYTHON)" $(ARGS)

wheels: build/stamps/environment-dev   ## the same for every CPython 3.10 to 3.14 at hand (ARGS="--python ... --python ...")
	"$(PYTHON)" tools/wheels.py $(ARGS)

clean:                             ## remove what was made, but for build/venv
	if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} +; fi
	rm -rf dist lapse.egg-info .pytest_cache .ruff_cache
	find $(wildcard lapse apps tests tracker tools benchmarks examples bindings) \( -name '*.so' -o -name '*.c' -o -name __pycache__ \) \
	    -exec rm -rf {} +

help:                              ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */  make \1 /p' Makefile | awk '{ n = $$2; $$1 = $$2 = ""; printf "  make %-10s%s\n", n, $$0 }'
	@echo; sed -n '/^# PYTHON/,/^$$/s/^# //p' Makefile

# --- how ---------------------------------------------------------------------------------------------------------------------------

.PHONY: $(APPS:%=apps/%) $(TESTS:%=tests/%)
$(APPS:%=apps/%) $(TESTS:%=tests/%): %: build/%
kernels: $(foreach folder,$(KERNELS),$(call stamp,$(folder)))

# Another Python or kind of build makes everything anew.
build/recipe: FORCE
	@mkdir -p build/stamps build/apps build/tests
	@echo '$(PYTHON) $(LAPSE_BUILD)' | cmp -s - $@ || echo '$(PYTHON) $(LAPSE_BUILD)' > $@

build/stamps/environment: pyproject.toml build/recipe
	@if [ "$(PYTHON)" = "$(VENV)/bin/python" ] && [ ! -x "$(PYTHON)" ]; then python3 -m venv "$(VENV)"; fi
	@"$(PYTHON)" tools/environment.py install build run
	@touch $@

build/stamps/environment-dev: build/stamps/environment
	@"$(PYTHON)" tools/environment.py install dev
	@touch $@

# An environment of its own: what is installed there changes nothing that is tested or measured.
build/stamps/environment-docs: pyproject.toml tools/environment.py build/recipe
	"$(PYTHON)" -m venv --clear build/docs
	build/docs/bin/python tools/environment.py install run testing docs
	@touch $@

build/stamps/lapse: $(shell find lapse -name '*.pyx' -o -name '*.pxd') setup.py build/stamps/environment
	LAPSE_ROOTS=lapse "$(PYTHON)" setup.py --quiet build_ext --inplace
	@touch $@

define kernel_rule
$(call stamp,$(1)): $(wildcard $(1)/*.pyx $(1)/*.pxd apps/common/*.pxd) build/stamps/lapse
	LAPSE_ROOTS=$(1) "$$(PYTHON)" setup.py --quiet build_ext --inplace
	@touch $$@
endef
$(foreach folder,$(KERNELS),$(eval $(call kernel_rule,$(folder))))

build/apps/matrix_factorization: $(call kernels,apps/mf)
build/apps/knowledge_graph_embeddings: $(call kernels,apps/kge)
build/apps/word2vec: $(call kernels,apps/w2v)
$(TESTS:%=build/tests/%): $(call kernels,tests/cluster)

# The executable: a few lines that run the program of this tree with the Python that it was compiled for.
define launcher
#!$(PYTHON)
"""Runs $(1) of this source tree."""
import runpy
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[:0] = [str((root / "$(1)").parent), str(root)]
runpy.run_path(str(root / "$(1)"), run_name="__main__")
endef

define write_launcher
	$(file > $@,$(call launcher,$(1)))@chmod +x $@
endef

$(APPS:%=build/apps/%): build/apps/%: apps/%.py build/stamps/lapse Makefile
	$(call write_launcher,apps/$*.py)

$(TESTS:%=build/tests/%): build/tests/%: tests/cluster/%.py build/stamps/lapse Makefile
	$(call write_launcher,tests/cluster/$*.py)

# A sanitizer's build lies in a copy of the tree, so that it does not disturb the one in place. libstdc++ comes first with it because
# libzmq throws, and AddressSanitizer must know where to. Reports go to files, and any is an error, also of a process that a test has
# started; those of UndefinedBehaviorSanitizer go to the terminal, and end the process. The simulation comes first, with threads for actors
# and without suppressions. SANITIZED are tests, SIMULATED schedules. Each file of tests has a process of its own: a child that is forked
# while threads of earlier tests are alive is more than ThreadSanitizer can follow.
SANITIZED ?= $(filter-out $(UNSANITIZED),$(wildcard tests/unit/test_*.py)) \
    $(patsubst %,"tests/test_programs.py::test_program[%---sys.location_caches_1]",\
    test_connection-2 test_consistency-2 test_dynamic_allocation-2 test_locality_api-2 test_many_key_operations-2 test_many_key_operations-3 \
    test_sampling-2 test_set_operation-2 test_variable_length_values-2)
SIMULATED ?= 2000
# Left out: tests of tools and pages, which run foreign programs and none of the core; the simulation, which runs by itself; what looks at
# signals, of which a sanitizer's runtime has its own, or at the size of processes, to which it adds; under ThreadSanitizer a child that is
# forked and starts threads, which it forbids.
UNSANITIZED = $(patsubst %,tests/unit/test_%.py,benchmarks check docs fetch_kge fetch_text fetching lint locks memory parking peers \
    simulation spreading stubs)
DESELECTED = $(patsubst %,--deselect tests/unit/test_launch.py::%,\
    test_the_nodes_environment test_the_first_failed_node_is_named_and_its_code_returned) \
    $(if $(filter tsan,$@),--deselect tests/unit/test_node.py::test_fork)
TREE := $(wildcard Makefile setup.py pyproject.toml README.md LICENSE NOTICE lapse apps tests tracker tools benchmarks examples bindings)
REPORTS = log_path=$(CURDIR)/build/$@/report
define sanitize
	mkdir -p build/$(1)
	find build/$(1) -path build/$(1)/build -prune -o -name '*.p[yx]*' -type f -exec rm {} +
	rm -f build/$(1)/report.*
	tar -cf - --exclude='*.so' --exclude=__pycache__ $(TREE) | tar -xf - -C build/$(1)
	$(MAKE) -C build/$(1) PYTHON="$(PYTHON)" LAPSE_BUILD=$(1) all kernels
	cd build/$(1) && export LD_PRELOAD="$$(gcc -print-file-name=lib$(1).so) $$(gcc -print-file-name=libstdc++.so.6)" && \
	    { $(2)="$(3) $(REPORTS)" "$(PYTHON)" -m lapse.testing --actors threads --schedules $(SIMULATED) --processes 2 && \
	      export $(2)="$(3) $(REPORTS) $(4)" && printf '%s\n' $(SANITIZED) | \
	      xargs -d '\n' -n 1 "$(PYTHON)" -m pytest --quiet -p no:cacheprovider --capture=no $(DESELECTED) $(ARGS); \
	      code=$$?; unset LD_PRELOAD; grep -l "WARNING: \|ERROR: " report.* 2>/dev/null | xargs --no-run-if-empty cat > reports; cat reports; \
	      echo "$(1): $$(grep -c "^SUMMARY: " reports) reports"; test ! -s reports || code=1; exit $$code; }
endef
