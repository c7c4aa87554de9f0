# `make demo`, `make test` and `make test-slow` set everything up by themselves on a fresh Debian/Ubuntu machine.
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

.PHONY: help demo test test-slow lint docs setup gpu ffcv-packages bench bench-setup bench-loader bench-kernels bench-step bench-train bench-accuracy bench-agreement \
	bench-exchange clean

help:
	@echo "make demo   set up, prepare photographs, pre-train on them, evaluate, write runs/demo/report.html (5 minutes)"
	@echo "make test   set up, ruff, the fast tests (5 minutes after set-up)"
	@echo "make test-slow   the others: compilers, the interpreter, several ranks, whole runs (12 to 20 minutes)"
	@echo "make lint   ruff alone"
	@echo "make docs   build the documentation site into site/; open site/index.html, no server needed (seconds after set-up)"
	@echo "make bench  everything against everyone on this CPU: kernels, loader, step, training, accuracy; runs/bench/against_cpu.md (20 minutes)"
	@echo "make bench-loader   the loader against lightly, torchvision, DALI and FFCV, in an environment of its own"
	@echo "make bench-kernels  optimizer, target and augmentation on the CPU against other people's, in that environment"
	@echo "make bench-step     one training step against lightly's, byol-pytorch's and plain torch's, in that environment"
	@echo "make bench-train    whole training, loader and step, against lightly's loop, in that environment"
	@echo "make bench-accuracy whole runs on Fashion-MNIST, time and accuracy, against lightly's, in that environment"
	@echo "make bench-agreement whether profile, bench and plan say the same of this machine"
	@echo "make gpu    on a CUDA machine: facts, tests, short trainings, then the step, kernels, loaders and whole runs (25 minutes by estimate)"
	@echo "make clean  remove the virtual environments, the demo's corpus and run, and the documentation site"

setup: $(STAMP)

# The venv is used as it is until pyproject.toml changes.
$(STAMP): pyproject.toml
	@echo "== setting up $(VENV): a virtual environment with torch and fastbyol (about 6 GB, one to ten minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

# The tests run DALI's and FFCV's backends too, on the CPU.
$(TEST_STAMP): $(STAMP)
	@$(MAKE) --no-print-directory ffcv-packages
	@echo "== adding DALI and FFCV to $(VENV) (1 GB)"
	$(BIN)/pip install --quiet --editable '.[dev,dali,ffcv]'
	@touch $(TEST_STAMP)

# FFCV has no wheels.
ffcv-packages:
	@pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && exit 0; \
	echo "== FFCV is compiled, which needs: apt-get install $(FFCV_PACKAGES)"; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root=sudo; \
	else echo "make: run that command as root first" >&2; exit 1; fi; \
	$$root apt-get -qq update && $$root apt-get -qq install -y --no-install-recommends $(FFCV_PACKAGES) >/dev/null

# Small networks gain nothing from more than one thread: a process per core does, up to four.
test test-slow: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4

# Triton compiles or interprets its kernels for the whole of a process, so those that need the interpreter have their own.
test: lint $(TEST_STAMP)
	$(PYTEST) --dist loadfile -m "not slow and not interpreter"
	TRITON_INTERPRET=1 $(BIN)/pytest -m "interpreter and not slow"

test-slow: $(TEST_STAMP)
	$(PYTEST) --dist worksteal -m "slow and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m "slow and interpreter"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# .venv has mkdocs through the dev extra, since the tests build the site too. Strict: a broken link or anchor fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== open site/index.html"

data/photos: | $(STAMP)
	$(BIN)/fastbyol prepare photos --out data/photos --images 3600 --size 80 --seed 0

demo: $(STAMP) data/photos
	@echo "== pre-training; an earlier demo run is replaced"
	rm -rf runs/demo
	$(BIN)/fastbyol train --config configs/demo.yaml
	@echo "== what the features are worth, beside the untrained network and raw pixels"
	$(BIN)/fastbyol eval knn --run runs/demo
	$(BIN)/fastbyol eval linear --run runs/demo
	@echo "== open runs/demo/report.html"

# The peers live in an environment of their own.
bench-setup: $(BENCH_STAMP)

$(BENCH_STAMP): benchmarks/requirements.txt pyproject.toml
	@echo "== setting up $(BENCH_VENV): fastbyol and the trainers and loaders it is measured against"
	@$(MAKE) --no-print-directory ffcv-packages
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --editable . -r benchmarks/requirements.txt
	@touch $(BENCH_STAMP)

bench-loader: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py --set backends

# Everything against everyone, in fewer and shorter turns than the targets below take; only on a machine with nothing else to do do ratios mean anything.
bench: $(BENCH_STAMP)
	@mkdir -p $(RESULTS)
	$(BENCH_VENV)/bin/pytest $(KERNEL_BENCHMARKS) --devices cpu --rounds 3 --results $(RESULTS)
	$(BENCH_VENV)/bin/python benchmarks/bench_loader.py --sizes 224 --rounds 2 --seconds 4 --only $(LOADERS) --out $(RESULTS)/loader.csv
	$(BENCH_VENV)/bin/python benchmarks/bench_step.py --rounds 2 --out $(RESULTS)/step_cpu.csv
	$(BENCH_VENV)/bin/python benchmarks/bench_train.py --rounds 2 --seconds 8 --out $(RESULTS)/train_cpu.csv
	$(BENCH_VENV)/bin/python benchmarks/time_to_accuracy.py --seeds 0 --out $(RESULTS)/accuracy.csv
	$(BENCH_VENV)/bin/python benchmarks/agreement.py --rounds 1 --sets "R18 96 px, batch 32" "R18 128 px, batch 32" --out $(RESULTS)/agreement.csv
	$(BENCH_VENV)/bin/python benchmarks/against.py --results $(RESULTS)

# The CPU's half of the kernel benchmarks with all peers.
bench-kernels: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/pytest $(KERNEL_BENCHMARKS) --devices cpu

# On a machine with nothing else to do; the device is the GPU where there is one.
bench-step: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_step.py

bench-train: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/bench_train.py

bench-accuracy: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/time_to_accuracy.py

bench-agreement: $(STAMP)
	$(BIN)/python benchmarks/agreement.py

# Bytes between GPUs, counted from the model: an estimate, which measures nothing.
bench-exchange: $(STAMP)
	$(BIN)/python benchmarks/exchange.py

# On a CUDA machine; benchmarks/gpu.py says what it runs. GPU_PYTHON=python3 takes an interpreter that is there instead of .venv.
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) data/photos runs/demo site
