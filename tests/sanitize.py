"""The tests of ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer, which `make sanitize` makes: each
instruction set that it has. Arguments go to pytest. Leaks are not looked for, as Python's own would drown them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cuda_on_cpu.driver import asan_environment

HERE = Path(__file__).parent
# What calls kernels in this process; first what finds most in the least time.
FILES = (
    "fuzz", "errors", "threads", "batch_norm", "batch_renorm", "layer_norm", "group_norm", "instance_norm", "dropout",
    "alpha_dropout", "drop_path", "local_response_norm", "parametrizations", "ops",
)  # fmt: skip
# Tests that use more memory than a sanitizer leaves, or measure it, or start processes without one.
LEFT_OUT = "not kept_for_backward and not data_loader"


def main() -> int:
    environment = {**asan_environment(), "OMP_NUM_THREADS": "2"}
    script = "import torch, fastnorm; print(fastnorm.build_info()['instruction_set'], torch.get_num_threads())"
    named = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    best = named.stdout.split()[0].lower()
    sets = {"avx512": ("avx512", "avx2", "default"), "avx2": ("avx2", "default")}.get(best, (best,))
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    for name in sets:
        print(f"sanitizers: {name}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--capture=sys",
            "-p",
            "no:cacheprovider",
            "-k",
            LEFT_OUT,
            *files,
        ]
        # of torch's own kernels, too: tests allow more where vectors are short
        forced = {"ATEN_CPU_CAPABILITY": name} if name in ("avx512", "avx2", "default") else {}
        done = subprocess.run([*command, *sys.argv[1:]], env={**environment, **forced}, cwd=HERE.parent)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
