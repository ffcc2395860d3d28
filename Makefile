# Everything a fresh machine needs is made here: Python >= 3.10, a C++ compiler and make are enough.
#   make ladder   the CIFAR-10 trick ladder (examples/cifar_ladder.py), on the spot
#   make test     all tests
#   make lint     ruff and clang-format
#   make bench    benchmarks against torch.nn
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
PYTHON_FILES := setup.py fastnorm tests benchmarks examples

.PHONY: ladder test lint format bench build clean
.DEFAULT_GOAL := build

# torch first and by its exact version: an open range would pull the CUDA build, gigabytes of it.
$(VENV)/.ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" ninja pybind11 numpy \
		"pytest>=8" "pytest-benchmark>=5" "hypothesis>=6" "matplotlib>=3.8" "tqdm>=4.66" ruff==0.17.5 clang-format==18.1.8
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastnorm.pth"
	touch $@

# The extension lies beside the Python files, so that an edit of those needs no build.
build/.built: $(VENV)/.ready $(SOURCES)
	mkdir -p build
	$(BIN)/python setup.py build_ext --inplace > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	touch $@

build: build/.built

ladder: build
	$(BIN)/python examples/cifar_ladder.py $(ARGS)

test: build
	$(BIN)/python -m pytest $(ARGS)

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist fastnorm.egg-info fastnorm/_C*.so runs .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
