# `make demo`, `make test` and `make test-slow` install everything that they need on a new
# Debian/Ubuntu machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
FFCV_PACKAGES := libopencv-dev libturbojpeg0-dev pkg-config g++
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed
RESULTS ?= runs/bench
LOADERS := "decode only" fastbyol lightly "torchvision v2" "DALI CPU" "FFCV (1 view, crop + flip)"

GPU_PYTHON ?= $(BIN)/python
KERNEL_BENCHMARKS := benchmarks/bench_lars_ema.py benchmarks/bench_augment.py -rs --benchmark-disable-gc

.PHONY: help demo test test-slow lint docs setup gpu ffcv-packages bench bench-setup bench-loader \
	bench-kernels bench-step bench-train bench-accuracy bench-agreement bench-exchange clean

help:
	@echo "make demo             pre-train on photographs, evaluate, write runs/demo/report.html (5 minutes)"
	@echo "make test             ruff and the fast tests (5 minutes)"
	@echo "make test-slow        tests of compilers, the interpreter, multiple ranks and whole runs (12 to 20 minutes)"
	@echo "make lint             ruff check and ruff format --check"
	@echo "make docs             build the documentation site, site/index.html (seconds)"
	@echo "make bench            short benchmarks against all peers on this CPU, runs/bench/against_cpu.md (20 minutes)"
	@echo "make bench-loader     loader against lightly, torchvision, DALI and FFCV"
	@echo "make bench-kernels    optimizer, target update and augmentation on the CPU against other libraries"
	@echo "make bench-step       training step against lightly, byol-pytorch and plain torch"
	@echo "make bench-train      training (loader and step) against lightly"
	@echo "make bench-accuracy   whole runs on Fashion-MNIST, time and accuracy against lightly"
	@echo "make bench-agreement  check that profile, bench and plan agree on this machine"
	@echo "make bench-exchange   estimate the bytes exchanged between GPUs"
	@echo "make gpu              tests and benchmarks on a CUDA machine (about 25 minutes)"
	@echo "make clean            remove the virtual environments, demo corpus, demo run and documentation site"
	@echo "The first use creates .venv, or .venv-bench for comparisons, which takes one to ten minutes."

setup: $(STAMP)

# The venv is updated only if pyproject.toml changes.
$(STAMP): pyproject.toml
	@echo "== setting up $(VENV): a virtual environment with torch and fastbyol (about 6 GB, one to ten minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set it with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

# The tests include the DALI and FFCV backends on the CPU.
$(TEST_STAMP): $(STAMP)
	@$(MAKE) --no-print-directory ffcv-packages
	@echo "== adding DALI and FFCV to $(VENV) (1 GB)"
	$(BIN)/pip install --quiet --editable '.[dev,dali,ffcv]'
	@touch $(TEST_STAMP)

# FFCV has no wheels.
ffcv-packages:
	@pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && exit 0; \
	echo "== compiling FFCV needs: apt-get install $(FFCV_PACKAGES)"; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root=sudo; \
	else echo "make: run this command as root first" >&2; exit 1; fi; \
	$$root apt-get -qq update && $$root apt-get -qq install -y --no-install-recommends $(FFCV_PACKAGES) >/dev/null

# Small networks do not scale with threads, so run one single-threaded process per core, up to four.
test test-slow: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4

# Triton chooses between compiler and interpreter once per process, so interpreter tests run
# separately.
test: lint $(TEST_STAMP)
	$(PYTEST) --dist loadfile -m "not slow and not interpreter"
	TRITON_INTERPRET=1 $(BIN)/pytest -m "interpreter and not slow"

test-slow: $(TEST_STAMP)
	$(PYTEST) --dist worksteal -m "slow and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m "slow and interpreter"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mkdocs is part of the dev extra, since the tests build the site too. --strict fails on broken
# links and anchors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== open site/index.html"

data/photos: | $(STAMP)
	$(BIN)/fastbyol prepare photos --out data/photos --images 3600 --size 80 --seed 0

demo: $(STAMP) data/photos
	@echo "== pre-training (replaces an earlier demo run)"
	rm -rf runs/demo
	$(BIN)/fastbyol train --config configs/demo.yaml
	@echo "== evaluating the features against the untrained network and raw pixels"
	$(BIN)/fastbyol eval knn --run runs/demo
	$(BIN)/fastbyol eval linear --run runs/demo
	@echo "== open runs/demo/report.html"

# Peers are installed in a separate environment.
bench-setup: $(BENCH_STAMP)

$(BENCH_STAMP): benchmarks/requirements.txt pyproject.toml
	@echo "== setting up $(BENCH_VENV): fastbyol and the libraries for comparison"
	@$(MAKE) --no-print-directory ffcv-packages
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --editable '.[parquet]' -r benchmarks/requirements.txt
	@touch $(BENCH_STAMP)

bench-loader: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py --set backends
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py --set image_sets

# All comparisons, with fewer and shorter rounds than the targets below. The ratios are meaningful
# only on an idle machine.
bench: $(BENCH_STAMP)
	@mkdir -p $(RESULTS)
	$(BENCH_VENV)/bin/pytest $(KERNEL_BENCHMARKS) --devices cpu --rounds 3 --results $(RESULTS)
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py --sizes 224 --rounds 2 --seconds 4 --only $(LOADERS) --out $(RESULTS)/loader.csv
	$(BENCH_VENV)/bin/python benchmarks/bench_step.py --rounds 2 --out $(RESULTS)/step_cpu.csv
	$(BENCH_VENV)/bin/python benchmarks/bench_train.py --rounds 2 --seconds 8 --out $(RESULTS)/train_cpu.csv
	$(BENCH_VENV)/bin/python benchmarks/time_to_accuracy.py --seeds 0 --out $(RESULTS)/accuracy.csv
	$(BENCH_VENV)/bin/python benchmarks/agreement.py --rounds 1 --sets "R18 96 px, batch 32" "R18 128 px, batch 32" --out $(RESULTS)/agreement.csv
	$(BENCH_VENV)/bin/python benchmarks/against.py --results $(RESULTS)

# CPU part of the kernel benchmarks, with all peers.
bench-kernels: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/pytest $(KERNEL_BENCHMARKS) --devices cpu

# Needs an idle machine. Runs on the GPU if there is one.
bench-step: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_step.py

bench-train: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_train.py

bench-accuracy: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/time_to_accuracy.py

bench-agreement: $(STAMP)
	$(BIN)/python benchmarks/agreement.py

# Estimate the bytes exchanged between GPUs from the model, without measurements.
bench-exchange: $(STAMP)
	$(BIN)/python benchmarks/exchange.py

# Needs a CUDA machine; see benchmarks/gpu.py. GPU_PYTHON=python3 uses an installed interpreter
# instead of .venv.
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) data/photos runs/demo site
