"""Plants bugs in the CUDA kernels, one at a time, and reports which of the emulator's modes catches each.

    python -m cuda_on_cpu.mutate [-k TEXT] [--every-mode]    from tests/; make mutate runs it all

A mutation changes a copy of csrc/, never the sources. One that no mode catches is a hole in the tests, and an exit
status of 1; so is one whose text is no longer in its file, or that does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu import driver

TESTS = driver.HERE.parent
SOURCES = TESTS.parent / "csrc"
MODES = ("random", "trace", "asan")


@dataclass(frozen=True)
class Mutation:
    file: str  # in csrc/cuda
    old: str
    new: str
    tests: str  # pytest -k: the cases that run the line
    nth: int = 0  # which of the places where `old` is

    def __str__(self) -> str:
        shown = [re.sub(r"\s+", " ", text).strip() for text in (self.old, self.new)]
        return f"{self.file}: {shown[0]} -> {shown[1] or 'nothing'}" + (f" ({self.nth})" if self.nth else "")

    def apply(self, csrc: Path) -> None:
        path = csrc / "cuda" / self.file
        parts = path.read_text().split(self.old)
        if len(parts) < self.nth + 2:
            raise LookupError(f"{self}: {self.file} has that text {len(parts) - 1} times")
        before, after = self.old.join(parts[: self.nth + 1]), self.old.join(parts[self.nth + 1 :])
        path.write_text(before + self.new + after)


# fmt: off
MUTATIONS = (
    # ---- dropout
    Mutation("dropout.cu", "drawn >> (k * kPack + j) & 1", "drawn >> (k * kPack + j + 1) & 1", "dropout"),
    Mutation("dropout.cu", "if (phase + count > kElementsPerPhilox) keep", "if (false) keep", "dropout2d"),
    Mutation("dropout.cu", "random.word[w] >= threshold_", "random.word[w] > threshold_ + 65536", "dropout"),
    Mutation("dropout.cu", "in_tile / kElementsPerPhilox)", "in_tile / kElementsPerPhilox ^ 1)", "dropout"),
    Mutation("dropout.cu", "row < rows && c < call.C ?", "row <= rows && c < call.C ?", "dropout"),
    Mutation("dropout.cu", "if (warp >= call.N * strips * groups) return;", "", "dropout"),
    Mutation("dropout.cu", "whole_packs && is_aligned(a.x, a.y)", "whole_packs && is_aligned(a.x)", "dropout"),
    Mutation("dropout.cu", "if (s < call.S) call.apply", "call.apply", "dropout2d"),
    # ---- local response normalisation
    Mutation("local_response_norm.cu", "    __syncthreads();\n\n    if (both) {", "    if (both) {", "local_response"),
    Mutation("local_response_norm.cu", "        __syncthreads();\n      }\n", "      }\n", "local_response_norm-intra"),
    Mutation("local_response_norm.cu", "if (tile + gridDim.x < plan.tiles()) __syncthreads();", "", "local_response"),
    Mutation("local_response_norm.cu", "window(near.column, c, column.before, column.after, far.column)",
             "window(near.column, c, column.after, column.before, far.column)", "local_response"),
    Mutation("local_response_norm.cu", "-2 * call.a * call.beta", "-2 * call.a", "local_response"),
    Mutation("local_response_norm.cu", "span.begin + span.size + right, length)",
             "span.begin + span.size + right, length + 1)", "local_response"),
    Mutation("local_response_norm.cu", "inverse[j] = r * r;", "inverse[j] = r;", "local_response"),
    Mutation("local_response_norm.cu", "reinterpret_cast<uintptr_t>(p + place(region, 0, 0, 0)) % kAccess == 0",
             "true", "local_response"),
    # ---- what kernels share
    Mutation("pack.cuh", "j >= begin && j < end ? p[j]", "j >= begin && j <= end ? p[j]", "dropout or local_response"),
    Mutation("pack.cuh", "if (j >= begin && j < end) p[j]", "if (j >= begin && j <= end) p[j]", "dropout"),
)
# fmt: on


@dataclass(frozen=True)
class Outcome:
    caught: tuple[str, ...]  # by these modes
    problem: str = ""  # why it could not be tried


def _caught(mutation: Mutation, mode: str, csrc: Path) -> bool:
    environment = driver.asan_environment() if mode == "asan" else dict(os.environ)
    environment |= {"FASTNORM_CUDA_ON_CPU_CSRC": str(csrc), "FASTNORM_CUDA_IN_FULL": "1"}
    if mode == "asan":
        environment["FASTNORM_CUDA_UNDER_SANITIZERS"] = "1"
    # The traffic is counted in mode trace, under names that do not say so.
    files = ["tests/test_cuda_on_cpu.py", *(["tests/test_cuda_traffic.py"] if mode == "trace" else [])]
    chosen = f"({mutation.tests}) and ({mode}{' or traffic' if mode == 'trace' else ''}) and not sanitizers"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", chosen]
    done = subprocess.run([*command, *files], cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    if "BuildError" in done.stdout:
        raise RuntimeError("does not compile: " + "".join(re.findall(r"^E .*error: .*\n", done.stdout, re.M)[:1]))
    tested = re.search(r"\d+ (passed|failed)", done.stdout)
    died = mode == "asan" and re.search(r"Sanitizer|runtime error", done.stderr)
    if not tested and not died:
        raise RuntimeError(f"no test ran for -k {chosen!r}: {done.stdout[-300:]}")
    return done.returncode != 0


def try_mutation(mutation: Mutation, every_mode: bool = False) -> Outcome:
    """By the first mode that catches it, or by all that do."""
    caught: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastnorm_mutation_") as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(SOURCES, csrc, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
        try:
            mutation.apply(csrc)
            for mode in MODES:
                if _caught(mutation, mode, csrc):
                    caught.append(mode)
                    if not every_mode:
                        break
        except (LookupError, RuntimeError) as problem:
            return Outcome(tuple(caught), str(problem))
    return Outcome(tuple(caught))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutations whose description has this text")
    parser.add_argument("--every-mode", action="store_true", help="also try modes after the first that catches")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.k in str(m)]
    missed = 0
    for i, mutation in enumerate(chosen, 1):
        start = time.monotonic()
        outcome = try_mutation(mutation, options.every_mode)
        missed += not outcome.caught
        verdict = outcome.problem or ", ".join(outcome.caught) or "NOT CAUGHT"
        print(f"{i}/{len(chosen)}  {verdict:20}  {mutation}  [{time.monotonic() - start:.0f} s]", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
