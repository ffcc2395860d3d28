"""Build of fastnorm._C: host code and CUDA once, csrc/cpu once per instruction set, linked into one extension.

CUDA is compiled in iff torch was built with it, there is a toolkit, and FASTNORM_CUDA is not 0; a GPU is not asked for.
With FASTNORM_CUDA=1, or a CUDA_HOME, a build that would come to be without is refused.
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") chooses the architectures, CUDA_HOME the toolkit, MAX_JOBS how many files at once.
FASTNORM_PLAIN=1 leaves AVX2 and AVX512 out, so that a build to debug with takes a third of the time.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

# pip itself refuses an older Python; of torch it knows nothing where it builds without isolation.
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
    raise SystemExit(f"fastnorm: needs torch 2.11 or later, found {torch.__version__}; pip install --upgrade torch")


def by_whole_vectors(bits):
    """Flags by which gcc clears and copies arrays by vectors of this width, if the compiler is gcc 12 or later.

    Else it does so 16 bytes at a time, and a wider vector that is loaded from several stores waits a dozen cycles.
    """
    flags = [f"-mmove-max={bits}", f"-mstore-max={bits}"]
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    tried = subprocess.run([*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return flags if tried.returncode == 0 else []


# Flags and namespace of each instruction set.
INSTRUCTION_SETS = {"DEFAULT": ["-O3"]}
# On kernels: else where a loop begins within a cache line, and so up to a seventh of its speed, is a matter of what was
# linked before it.
ALIGNMENT = ["-falign-functions=64", "-falign-loops=32"]
PLAIN = os.environ.get("FASTNORM_PLAIN") == "1"
if platform.machine() in ("x86_64", "AMD64"):
    # For processors of before 2013, and virtual ones that hide what they have: -O3 would make the kernels 5 to 25 %
    # faster and take 1.7 times as long. gcc 12 folds lambdas of several array sizes and then warns of its own folding.
    INSTRUCTION_SETS["DEFAULT"] = ["-O1", "-Wno-array-bounds"]
if platform.machine() in ("x86_64", "AMD64") and not PLAIN:
    INSTRUCTION_SETS["AVX2"] = ["-O3", "-mavx2", "-mfma", "-mf16c", *by_whole_vectors(256)]
    INSTRUCTION_SETS["AVX512"] = ["-O3", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] += ["-mbmi2", *by_whole_vectors(512)]
    INSTRUCTION_SETS["AVX512"] += ["-Wno-uninitialized"]  # false alarms in gcc 12's own headers

# Contraction is off because kernels say themselves where they fuse a multiplication and an addition: backward must
# recompute what forward computed, bit for bit.
CXX_FLAGS = [
    "-O1",
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-g0",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    # gcc would collect its garbage from 128 MB on, a tenth of its time; so a file takes up to 1.1 GB instead of 0.6.
    "--param=ggc-min-heapsize=524288",
    *(["-DFASTNORM_PLAIN"] if PLAIN else []),
]
# More flags for compiler and linker, after all others: `make sanitize` builds with them.
EXTRA_FLAGS = os.environ.get("FASTNORM_CXX_FLAGS", "").split()

# torch's BuildExtension takes away the operators and conversions of half and bfloat16; -U gives them back.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]
NVCC_FLAGS += ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF2_OPERATORS__"]
NVCC_FLAGS += ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def find_cuda_home():
    """The toolkit that CUDA_HOME or CUDA_PATH names, else nvcc's own, else /usr/local/cuda; None for the CPU alone.

    nvcc may be a script that calls the compiler somewhere else, so it is asked where it is.
    """
    wanted = os.environ.get("FASTNORM_CUDA")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        if wanted == "1":
            raise SystemExit(f"fastnorm: FASTNORM_CUDA=1, but torch {torch.__version__} was built without CUDA")
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [named] if named else []
    nvcc = shutil.which("nvcc")
    if nvcc and not named:
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        candidates += re.findall(r"TOP=(\S+)", dryrun.stdout + dryrun.stderr)
    if not named:
        candidates.append("/usr/local/cuda")
    homes = [Path(c).resolve() for c in candidates]
    found = next((h for h in homes if (h / "include/cuda_runtime.h").exists() and (h / "bin/nvcc").exists()), None)
    if found is None and (named or wanted == "1"):
        raise SystemExit(
            f"fastnorm: no CUDA toolkit (bin/nvcc, include/cuda_runtime.h) in {named or 'the usual places'}: "
            "set CUDA_HOME to one, or FASTNORM_CUDA=0 to build for the CPU alone"
        )
    return found


def check_cuda_version(cuda_home):
    """CUDA's libraries are compatible within a major version, so the toolkit must be of torch's."""
    said = subprocess.run([cuda_home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+)\.\d+", said)
    wanted = torch.version.cuda.split(".")[0]
    if toolkit and toolkit[1] != wanted:
        raise SystemExit(
            f"fastnorm: torch {torch.__version__} needs a CUDA {wanted} toolkit, but {cuda_home} is CUDA {toolkit[1]}: "
            f"set CUDA_HOME to a CUDA {wanted} toolkit, or FASTNORM_CUDA=0 to build for the CPU alone"
        )


def architectures(cuda_home):
    """Compute capabilities, as 90 for 9.0, to compile machine code for, and those to add PTX for."""
    listed = subprocess.run([cuda_home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {int(n) for n in re.findall(r"compute_(\d+)$", listed.stdout, re.MULTILINE)}
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    binaries, ptx = [], []
    for name in named or ARCHITECTURES.split():
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", name)
        if not match:
            raise SystemExit(f"fastnorm: TORCH_CUDA_ARCH_LIST has entries as 9.0 or 9.0+PTX, got {name!r}")
        capability = int(match[1] + match[2])
        if capability in known:
            binaries.append(capability)
            ptx += [capability] if match[3] else []
        elif named:
            raise SystemExit(f"fastnorm: {cuda_home} cannot compile for {name}, only for {sorted(known)}")
    if not named and not ptx:  # a toolkit older than our list: devices newer than it compile its latest for themselves
        ptx = [max(binaries)]
    return binaries, ptx


CUDA_HOME = find_cuda_home()
CUDA_MACROS = []
if CUDA_HOME:
    check_cuda_version(CUDA_HOME)
    cpp_extension.CUDA_HOME = str(CUDA_HOME)  # torch's guess is where `nvcc` lies
    BINARIES, PTX = architectures(CUDA_HOME)
    NVCC_FLAGS += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in BINARIES]
    NVCC_FLAGS += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in PTX]
    OPS = [Path(f).stem for f in sorted(glob("csrc/cuda/*.cu")) if Path("csrc", Path(f).stem + ".cpp").exists()]
    CUDA_MACROS = [
        ("FASTNORM_WITH_CUDA", None),
        ("FASTNORM_CUDA_BINARIES", ",".join(map(str, BINARIES))),
        ("FASTNORM_CUDA_PTX", ",".join(map(str, PTX))),
        ("FASTNORM_CUDA_OPS", ",".join(OPS)),
    ]
# Else ninja starts a compiler or two more than there are processors, each of up to 2 GB.
os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))


def largest_first(pattern):
    """These take longest: if they are first, no processor waits for the last one."""
    return sorted(glob(pattern), key=os.path.getsize, reverse=True)


class build_ext(cpp_extension.BuildExtension):
    def build_extension(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            macros = [("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)]
            objects = self.compiler.compile(
                largest_first("csrc/cpu/*.cpp"),
                output_dir=str(Path(self.build_temp) / name.lower()),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": CXX_FLAGS + flags + ALIGNMENT + EXTRA_FLAGS},
                depends=sorted(glob("csrc/**/*.h", recursive=True)),
            )
            if name != "DEFAULT" and not EXTRA_FLAGS:  # with less optimisation, functions that are inlined here are not
                check_no_shared_names(objects, name)
            ext.extra_objects += objects
        if CUDA_HOME:
            ext.extra_objects += self.compiler.compile(
                largest_first("csrc/cuda/*.cu"),
                output_dir=str(Path(self.build_temp) / "cuda"),
                include_dirs=[os.path.abspath("csrc"), os.path.abspath("csrc/cuda")],  # ninja runs elsewhere
                extra_postargs={"cxx": [], "nvcc": NVCC_FLAGS},
                depends=sorted(glob("csrc/**/*.*h", recursive=True)),
            )
        super().build_extension(ext)


def check_no_shared_names(objects, instruction_set):
    """Fails if an object compiled for `instruction_set` offers a function under a weak name that others may offer too.

    The linker keeps any one of several weak definitions, so a processor without the instruction set could come to run
    it.
    """
    if shutil.which("nm") is None:
        return
    table = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    shared = {row[2] for row in rows if len(row) == 3 and row[1] in "Wu" and f"{instruction_set}::" not in row[2]}
    if shared:
        raise RuntimeError(f"csrc/cpu compiled for {instruction_set} shares names with other code: {sorted(shared)}")


setup(
    ext_modules=[
        (cpp_extension.CUDAExtension if CUDA_HOME else cpp_extension.CppExtension)(
            "fastnorm._C",
            sorted(glob("csrc/*.cpp")),
            define_macros=CUDA_MACROS,
            extra_compile_args={"cxx": CXX_FLAGS + EXTRA_FLAGS},
            extra_link_args=["-fopenmp", *EXTRA_FLAGS],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
