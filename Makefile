# Everything a fresh machine needs is made here: Python >= 3.10, a C++ compiler and make are enough.
#   make ladder   the CIFAR-10 trick ladder (examples/cifar_ladder.py): four rungs in 5 minutes, ARGS=--resume the others
#   make test     all tests but the slow ones
#   make lint     ruff, clang-format and mypy
#   make bench    benchmarks against torch.nn
#   make fuzz     drawn calls of every op against float64: make fuzz ARGS="100000 --seed 1"
#   make accuracy largest errors of every op and type on hard inputs, beside torch's
#   make slow     the tests of tensors beyond 2^31 elements: 16 GB of memory, five minutes
#   make sanitize all kernels but the CUDA ones under AddressSanitizer and UndefinedBehaviorSanitizer: half an hour
#   make sanitize-quick  a choice of that, which CI runs: three minutes
#   make package  a source distribution and a wheel, which is tried in an empty environment
#   make mutate   bugs planted in the CUDA kernels, which the emulator must catch: an hour
# and for NVIDIA GPUs, with a CUDA toolkit:
#   make cuda-check          without a GPU: all CUDA kernels compile and none spills; the build passes the CPU's tests
#   make gpu-check OUT=DIR   with a GPU: tests, compute-sanitizer and benchmarks on it, tables in DIR
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.h)
CXX_FILES := $(wildcard csrc/*.* csrc/*/*.* tests/*.cpp tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.cu)
PYTHON_FILES := setup.py fastnorm tests benchmarks examples

# The CUDA build has an environment and a tree of its own: its torch is another, and so is its extension of the same name.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CURDIR)/$(CUDA_VENV)/bin
CUDA_TORCH := 2.11.0
CUDA_TREE := build/cuda
# In CI two: without and with clusters of blocks.
CUDA_CHECKED := $(if $(CI),8.0 9.0,8.0 9.0 10.0 12.0)
NVCC := $(shell command -v $${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc)

.PHONY: ladder test lint format bench fuzz accuracy slow sanitize sanitize-quick package mutate build \
	cuda-check gpu-check clean
.DEFAULT_GOAL := build

# torch first: the extension is compiled against it, and its version decides how large it is.
$(VENV)/.ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" ninja pybind11 numpy \
		"pytest>=8" "pytest-xdist>=3.7" "pytest-benchmark>=5" "hypothesis>=6" "matplotlib>=3.8" "tqdm>=4.66" \
		ruff==0.17.5 clang-format==18.1.8 mypy==2.4.1 "build>=1.2"
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastnorm.pth"
	touch $@

# The extension lies beside the Python files, so that an edit of those needs no build.
build/.built: $(VENV)/.ready $(SOURCES)
	mkdir -p build
	$(BIN)/python setup.py build_ext --inplace > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	touch $@

build: build/.built

ladder: build
	$(BIN)/python examples/cifar_ladder.py $(if $(ARGS),$(ARGS),--rungs 0,1,2,3 --minutes 5)

# A process a core, file by file in their order (else those of few tests come last, however long these take). Each has two
# threads, and one that waits must not keep a core from another process. ARGS="-n 0" is for a debugger: one process.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

fuzz: build
	PYTHONPATH=tests $(BIN)/python -m fuzz $(or $(ARGS),20000)

accuracy: build
	$(BIN)/python tests/accuracy.py $(ARGS)

slow: build
	$(BIN)/python -m pytest -m slow $(ARGS)

# A tree of its own, as its extension has the same name. The wide instruction sets are left out: under the sanitizers each
# takes ten times as long to compile; PLAIN=0 builds them too. Without the check of shifts, which GCC 12 gets wrong
# beside that of bounds. Without optimisation the compiler takes a fraction of the time.
PLAIN := 1
SANITIZERS := -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=shift,vptr \
	-fno-sanitize-recover=all
sanitize: OPTIMISE := -O1
sanitize-quick: OPTIMISE := -O0
sanitize-quick: QUICK := --quick
sanitize sanitize-quick: TREE = build/$@
sanitize sanitize-quick: $(VENV)/.ready
	mkdir -p $(TREE)
	rm -rf $(addprefix $(TREE)/,csrc fastnorm tests)
	tar -cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md csrc fastnorm tests | \
		tar -xf - -C $(TREE)
	cd $(TREE) && { FASTNORM_PLAIN=$(PLAIN) FASTNORM_CUDA=0 FASTNORM_CXX_FLAGS="$(OPTIMISE) $(SANITIZERS)" \
		$(CURDIR)/$(BIN)/python setup.py build_ext --inplace > log.txt 2>&1 || { cat log.txt; exit 1; }; }
	cd $(TREE) && $(CURDIR)/$(BIN)/python tests/sanitize.py $(QUICK) $(ARGS)

# Without isolation, which would download a torch to build with; the wheel belongs to the one in $(VENV).
package: $(VENV)/.ready
	rm -rf dist build/package
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/package
	build/package/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) dist/*.whl
	cd build/package && bin/python -m fastnorm

mutate: build
	PYTHONPATH=tests $(BIN)/python -m cuda_on_cpu.mutate $(ARGS)

$(CUDA_VENV)/.ready: Makefile
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(CUDA_TORCH)
	$(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77,<82" ninja pybind11 numpy \
		"pytest>=8" "pytest-xdist>=3.7" "hypothesis>=6" "matplotlib>=3.8" "tqdm>=4.66"
	touch $@

# The objects of kernels are made anew: it is their compiler's words that are checked. Left out are the tests that repeat
# others, or that have nothing to do with the build.
CUDA_UNTESTED := benchmarks readme gpu_check explain isa ladder ladder_data ladder_parts cuda_on_cpu cuda_emulator cuda_traffic adding_an_op packaging
cuda-check:
	@test -n "$(NVCC)" || { echo "cuda-check: needs a CUDA toolkit, but there is no nvcc"; exit 1; }
	$(MAKE) $(CUDA_VENV)/.ready
	mkdir -p $(CUDA_TREE)
	rm -rf $(addprefix $(CUDA_TREE)/,csrc fastnorm tests examples build/*/cuda)
	tar -cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md csrc fastnorm tests examples | \
		tar -xf - -C $(CUDA_TREE)
	cd $(CUDA_TREE) && { NVCC_APPEND_FLAGS=-Xptxas=-v TORCH_CUDA_ARCH_LIST="$(CUDA_CHECKED)" \
		$(CUDA_BIN)/python setup.py build_ext --inplace > log.txt 2>&1 || { cat log.txt; exit 1; }; }
	$(CUDA_BIN)/python tests/cuda_check.py $(CUDA_TREE)/log.txt
	cd $(CUDA_TREE) && $(CUDA_BIN)/python -m fastnorm
	cd $(CUDA_TREE) && OMP_WAIT_POLICY=passive \
		$(CUDA_BIN)/python -m pytest -q $(PARALLEL) tests $(CUDA_UNTESTED:%=--ignore tests/test_%.py) $(ARGS)

gpu-check:
	@test -n "$(OUT)" || { echo "gpu-check: needs OUT=DIR, where the tables go"; exit 1; }
	$(PYTHON) benchmarks/gpu_check.py "$(OUT)" $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist fastnorm.egg-info fastnorm/_C*.so runs .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
