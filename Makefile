# Set-up, demo and checks. `make help` lists what there is.
#
# Everything lives in .venv. A stamp there says which extras are installed, so a second run asks pip nothing;
# setup.py or requirements.lock newer than the stamp means installing again.

PYTHON ?= python3
ARGS ?=
TRIALS ?= 100
SEED ?= 1
# One rank per GPU, two at most; two ranks where there is no GPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)

TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
# DeepSpeed looks for python and ninja on PATH.
WITH_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint coverage bench-faults bench-glue bench-peers bench-profile bench-ranks bench-scaling \
    bench-scrapers bench-serving docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  ARGS='...' adds options; PYTHON=python3.12 chooses the Python of a new .venv; RANKS=n those of the demo"

demo: .venv/.installed-demo ## distil on the embedded data, on 2 ranks (ARGS: section.key=value ...)
	@$(WITH_PATH) $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu) $(BIN)/deepspeed --log_level error \
	    --num_accelerators $(RANKS) launcher/train.py --config configs/demo.yaml $(ARGS)

test: .venv/.installed-test ## run the test suite (ARGS: pytest options; -m slow: the programs of benchmarks/ alone)
	@$(WITH_PATH) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.installed-lint ## ruff check, ruff format, mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

coverage: .venv/.installed-test ## run the tests, report the lines of pkd_dist they miss, fail under 90 %
	@$(BIN)/coverage erase
	@$(WITH_PATH) $(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

bench-faults: .venv/.installed-test ## disturb a run again and again (TRIALS=n SEED=s; root, for links and disks)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.faults --trials $(TRIALS) --seed $(SEED) $(ARGS)

bench-glue: .venv/.installed-demo ## methods, depths and seeds on real tasks (GLUE=folder with SST-2/ and RTE/; ARGS)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.glue $(if $(GLUE),--glue-dir $(GLUE)) $(ARGS)

bench-peers: .venv/.installed-bench ## ours against TextBrewer, the Trainer and the authors' computation (ARGS: --quick, --seeds n)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.peers $(ARGS)

bench-profile: .venv/.installed-demo ## where a step's time goes (ARGS: --device cuda, --ranks 1,2, --steps n)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.profile $(ARGS)

bench-ranks: .venv/.installed-demo ## memory and time of a rank at 1, 10 and 100 times the data; start-up (ARGS: --output DIR)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.memory $(ARGS)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.startup $(ARGS)

bench-scaling: .venv/.installed-demo ## simulate shards and shuffling of a cache of 100 M rows (ARGS: --rows n --output FILE)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.scaling.shuffle $(ARGS)

bench-scrapers: .venv/.installed-demo ## what 50 hanging and 20 scrapes a second do to the steps of a run (ARGS: --pairs n)
	@$(BIN)/python -m benchmarks.scrapers $(ARGS)

bench-serving: .venv/.installed-test ## speed and accuracy of a run's export, and 64 clients for 60 s (ARGS: --run DIR ...)
	@$(WITH_PATH) $(BIN)/python -m benchmarks.serving $(ARGS)

docs: .venv/.installed-test ## write what is made from the code: docs/configuration.md, docs/metrics.md, the dashboard
	@$(BIN)/pkd config reference > docs/configuration.md.new
	@mv docs/configuration.md.new docs/configuration.md
	@$(BIN)/pkd metrics reference > docs/metrics.md.new
	@mv docs/metrics.md.new docs/metrics.md
	@$(BIN)/python -m monitoring.dashboard

lock: .venv/.installed-dev ## write requirements.lock from setup.py (ARGS=--upgrade: take newer versions)
	@$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.10 --quiet \
	    --no-annotate --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS) > /dev/null
	@# torch pins what it needs of CUDA itself, and its CPU build needs none of it.
	@sed -i -E '/^(nvidia-|cuda-|triton=)/d' requirements.lock

clean: ## remove caches and build products; .venv and runs/ stay
	@rm -rf build dist htmlcov *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
	@find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is needed ($(PYTHON) is not): try make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make a .venv: install the package python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

# The CPU build where no GPU is found: from where pip is set up to look, or from PyTorch's own index; the default
# build is several GB larger and comes last. What torch depends on follows with the project, at locked versions.
.venv/.torch: requirements.lock | $(BIN)/pip
	@echo "Installing torch $(TORCH)"
	@if nvidia-smi -L > /dev/null 2>&1; then $(PIP) --no-deps torch==$(TORCH); else \
	    $(PIP) --no-deps torch==$(TORCH)+cpu 2> /dev/null || \
	    $(PIP) --no-deps torch==$(TORCH)+cpu --index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 20 2> /dev/null || \
	    { echo "No CPU build of torch found: installing the default one"; $(PIP) --no-deps torch==$(TORCH); }; fi
	@touch $@

# DeepSpeed is built from source. In isolation (--use-pep517) it sees no torch and compiles nothing: no compiler is
# needed here, whatever CUDA is or is not on the machine.
.venv/.installed-%: setup.py requirements.lock .venv/.torch
	@echo "Installing pkd_dist[$*]"
	@DS_BUILD_OPS=0 $(PIP) --use-pep517 --constraint requirements.lock --editable '.[$*]'
	@touch $@
