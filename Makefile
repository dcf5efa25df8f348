# Set-up, demo, checks and benchmarks; `make help` lists the targets.
#
# Everything is installed into .venv. A stamp per extra records the installation: pip runs again only when pyproject.toml,
# setup.py or requirements.lock is newer.

PYTHON ?= python3
ARGS ?=
TRIALS ?= 100
SEED ?= 1
CUTS ?= 50
# One rank per GPU, at most two. Without GPUs one rank, whose threads use all cores: on two cores, two ranks take up to three times
# as long, because each step they exchange all gradients.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS ?= $(if $(filter 0 1,$(GPUS)),1,2)

TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
# DeepSpeed looks for python and ninja on PATH.
WITH_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint coverage bench-faults bench-power bench-glue bench-peers bench-profile bench-ranks \
    bench-scaling bench-scrapers bench-serving bench-sweep docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  ARGS='...' adds options; PYTHON=python3.12 selects the Python of a new .venv; RANKS=n sets the ranks of the demo"

demo: .venv/.installed-demo ## distil a small student on the embedded data (RANKS=2: on two ranks; ARGS: section.key=value ...)
	@$(WITH_PATH) $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu) $(BIN)/deepspeed --log_level error \
	    --num_accelerators $(RANKS) launcher/train.py --config configs/demo.yaml $(ARGS)

test: .venv/.installed-test ## run the test suite (ARGS: pytest options; -m slow: only measuring programs and other packages)
	@# Without bytecode, each of the processes that tests start would compile the package anew.
	@unset PYTHONDONTWRITEBYTECODE; $(WITH_PATH) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile \
	    --no-loadscope-reorder $(ARGS)

lint: .venv/.installed-lint ## ruff check, ruff format, mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

coverage: .venv/.installed-test ## run the tests, list uncovered lines of pkd_dist, fail below 90 % coverage
	@$(BIN)/coverage erase
	@$(WITH_PATH) $(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

bench-faults: .venv/.installed-test ## inject faults into a run (TRIALS=n SEED=s; needs root for network and disk faults)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.faults --trials $(TRIALS) --seed $(SEED) $(ARGS)

bench-power: .venv/.installed-test ## cut the power at moments of a recorded run (CUTS=n)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.faults.power --cuts $(CUTS) $(ARGS)

bench-glue: .venv/.installed-demo ## compare methods, depths and seeds on real tasks (GLUE=folder with SST-2/ and RTE/; ARGS)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.glue $(if $(GLUE),--glue-dir $(GLUE)) $(ARGS)

bench-peers: .venv/.installed-bench ## compare with TextBrewer, the Trainer and the authors' code (ARGS: --quick, --seeds n)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.peers $(ARGS)

bench-profile: .venv/.installed-demo ## profile the training step (ARGS: --device cuda, --ranks 1,2, --steps n)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.profile $(ARGS)

bench-ranks: .venv/.installed-demo ## memory and time of a rank at 1, 10 and 100 times the data; start-up (ARGS: --output DIR)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.memory $(ARGS)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.startup $(ARGS)

bench-scaling: .venv/.installed-demo ## simulate shards and shuffling of a cache of 100 M rows (ARGS: --rows n --output FILE)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.shuffle $(ARGS)

bench-scrapers: .venv/.installed-demo ## measure the effect of 50 hanging connections and 20 scrapes per second (ARGS: --pairs n)
	@$(BIN)/python -m benchmarks.scrapers $(ARGS)

bench-serving: .venv/.installed-test ## measure the export of a run, and pkd serve under 64 clients for 60 s (ARGS: --run DIR ...)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.serving $(ARGS)

bench-sweep: .venv/.installed-demo ## measure sweeps: 1,000 short trials, ten kills, the paper's grid (ARGS: --only small, --full)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.sweep $(ARGS)

docs: .venv/.installed-test ## generate docs/configuration.md, docs/metrics.md and the dashboard from the code
	@$(BIN)/pkd config reference > docs/configuration.md.new
	@mv docs/configuration.md.new docs/configuration.md
	@$(BIN)/pkd metrics reference > docs/metrics.md.new
	@mv docs/metrics.md.new docs/metrics.md
	@$(BIN)/python -m monitoring.dashboard

lock: .venv/.installed-dev ## write requirements.lock from pyproject.toml (ARGS=--upgrade: newer versions)
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --quiet \
	    --no-annotate --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS) > /dev/null
	@# The CUDA build of torch pins these packages itself; the CPU build does not need them.
	@sed -i -E '/^(nvidia-|cuda-|triton=)/d' requirements.lock

clean: ## remove caches and build products; keep .venv and runs/
	@rm -rf build dist htmlcov *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
	@find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is required, and $(PYTHON) is older: try make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot create a .venv: install the package python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

# Without a GPU, the CPU build: from pip's configured index, else from PyTorch's own, else the default build, which is
# several GB larger. The dependencies of torch are installed with the project, at locked versions.
.venv/.torch: requirements.lock | $(BIN)/pip
	@echo "Installing torch $(TORCH)"
	@if nvidia-smi -L > /dev/null 2>&1; then $(PIP) --no-deps torch==$(TORCH); else \
	    $(PIP) --no-deps torch==$(TORCH)+cpu 2> /dev/null || \
	    $(PIP) --no-deps torch==$(TORCH)+cpu --index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 20 2> /dev/null || \
	    { echo "No CPU build of torch found: installing the default one"; $(PIP) --no-deps torch==$(TORCH); }; fi
	@touch $@

# DeepSpeed is built from source. Build isolation (--use-pep517) hides torch from it, so it compiles nothing and needs
# neither a compiler nor CUDA.
.venv/.installed-%: pyproject.toml setup.py requirements.lock .venv/.torch
	@echo "Installing pkd_dist[$*]"
	@DS_BUILD_OPS=0 $(PIP) --use-pep517 --constraint requirements.lock --editable '.[$*]'
	@touch $@
