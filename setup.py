"""Build of fastnorm._C: host code and CUDA once, csrc/cpu once per instruction set, linked into one extension."""

import platform
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Flags and namespace of each instruction set.
INSTRUCTION_SETS = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    # For old processors: -O3 would take twice as long to compile. gcc 12 folds lambdas of several array sizes and then
    # warns of its own folding.
    INSTRUCTION_SETS["DEFAULT"] = ["-O2", "-Wno-array-bounds"]
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] += ["-Wno-uninitialized"]  # false alarms in gcc 12's own headers

# Contraction is off because kernels say themselves where they fuse a multiplication and an addition: backward must
# recompute what forward computed, bit for bit.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-g0",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]


class build_ext(BuildExtension):
    def build_extension(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            macros = [("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None), *ext.define_macros]
            objects = self.compiler.compile(
                sorted(glob("csrc/cpu/*.cpp")),
                output_dir=str(Path(self.build_temp) / name.lower()),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": CXX_FLAGS + flags},
                depends=sorted(glob("csrc/**/*.h", recursive=True)),
            )
            if name != "DEFAULT":
                check_no_shared_names(objects, name)
            ext.extra_objects += objects
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
        CppExtension(
            "fastnorm._C",
            sorted(glob("csrc/*.cpp")),
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
