"""The tests of ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer, which `make sanitize` makes: each
instruction set that it has, and some once more with outputs written as large ones are. Leaks are not looked for,
as Python's own would drown them.

With --quick a choice of them, for `make sanitize-quick`. Other arguments go to pytest.
"""

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
# Drawn calls of every op; several threads; of the table's rows one or more of each op, in the two types whose kernels
# have least in common.
QUICK_FILES = ("fuzz", "threads", "ops")
QUICK_CASES = (
    "batch_norm-train-residual-relu", "batch_norm-eval-gelu", "sync_batch_norm-train-residual-gelu",
    "batch_renorm-residual-relu", "group_norm-some-residual-leaky_relu", "group_norm-all-residual-relu",
    "instance_norm-input-residual-gelu", "layer_norm-residual-silu", "layer_norm-but-1-residual-leaky_relu",
    "rms_norm-relu", "dropout-0.5", "dropout2d-0.3", "alpha_dropout-0.5", "drop_path-0.25", "spectral_norm-1",
    "weight_norm-1", "local_response_norm-inter-torch-size5-beta0.75", "local_response_norm-intra-torch-size3-beta0.75",
)  # fmt: skip
QUICK = (
    "test_threads_get and not size100 or test_fuzz and test_against_float64 or test_ops and test_against_float64"
    f" and ({' or '.join(f'[cpu-{name}-' for name in QUICK_CASES)}) and (float32 or bfloat16)"
)


def main() -> int:
    environment = {**asan_environment(), "OMP_NUM_THREADS": "2"}
    script = "import torch, fastnorm; print(fastnorm.build_info()['instruction_set'], torch.get_num_threads())"
    named = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    best = named.stdout.split()[0].lower()
    sets = {"avx512": ("avx512", "avx2", "default"), "avx2": ("avx2", "default")}.get(best, (best,))
    quick, arguments = "--quick" in sys.argv, [a for a in sys.argv[1:] if a != "--quick"]
    runs = [(name, QUICK_FILES if quick else FILES, {}) for name in sets]
    if not quick:
        runs += [(name, ("fuzz", "layer_norm"), {"FASTNORM_STREAM_THRESHOLD": "0"}) for name in sets]
    for name, files, streamed in runs:
        print(f"sanitizers: {name}{', outputs past the caches' if streamed else ''}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--capture=sys",
            "-p",
            "no:cacheprovider",
            "-k",
            QUICK if quick else LEFT_OUT,
            *(str(HERE / f"test_{file}.py") for file in files),
        ]
        # of torch's own kernels, too: tests allow more where vectors are short
        forced = {"ATEN_CPU_CAPABILITY": name} if name in ("avx512", "avx2", "default") else {}
        done = subprocess.run([*command, *arguments], env={**environment, **forced, **streamed}, cwd=HERE.parent)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
