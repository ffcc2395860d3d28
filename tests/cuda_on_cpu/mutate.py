"""Plants bugs in the CUDA kernels, one at a time, and reports which of the emulator's modes catches each.

    PYTHONPATH=tests python -m cuda_on_cpu.mutate [-k TEXT] [--every-mode]    or make mutate, for all

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
from functools import cache
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
    by: str = "random"  # the mode that is tried first

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
_LRN = "local_response_norm.cu"
_BATCH, _GROUP = "batch_norm-train", "group_norm-some"
_PLANS = "every_plan and batch_norm-train"
_MERGES = "every_path and (batch_norm or group_norm)"
_RUNS = "every_plan and group_norm-some"  # slices of several channels
MUTATIONS = (
    # ---- dropout
    Mutation("dropout.cu", "drawn >> (k * kPack + j) & 1", "drawn >> (k * kPack + j + 1) & 1", "dropout"),
    Mutation("dropout.cu", "in_tile / kElementsPerPhilox)", "in_tile / kElementsPerPhilox ^ 1)", "dropout"),
    Mutation("dropout.cu", "row < rows && c < call.C ?", "row <= rows && c < call.C ?", "dropout", by="asan"),
    Mutation("dropout.cu", "is_aligned(a.x, a.y)", "is_aligned(a.x)", "dropout"),
    Mutation("dropout_plan.h", "aligned && C % window == 0", "aligned", "dropout", by="asan"),
    Mutation("dropout.cu", "if (s < call.S) call.apply", "call.apply", "dropout2d"),
    Mutation("dropout.cu", ">> index % kElementsPerPhilox", ">> 0", "dropout2d"),
    Mutation("dropout.cu", "if (channel / kElementsPerPhilox != block)", "if (k == 0)", "dropout2d"),
    Mutation("dropout.cu", "if (left < kPack)", "if (left < kPack - 1)", "dropout2d"),
    Mutation("dropout_plan.h", "p.is_narrow = S > 1 &&", "p.is_narrow =", "drop_path"),
    Mutation("dropout.cu", "(*args.offset) + args.added", "(*args.offset)", "dropout_state"),
    Mutation("dropout.cu", "  if (threadIdx.x != 0) return;\n  const uint64_t", "  const uint64_t", "dropout_state",
             by="trace"),
    # ---- local response normalisation
    *(Mutation(_LRN, "    __syncthreads();\n", "", "local_response_norm-intra or every_path", nth, "trace")
      for nth in range(6)),
    Mutation(_LRN, "buffer += other, other = -other;", "", "local_response_norm-intra", by="trace"),
    Mutation(_LRN, "writes = reads && c >= plan.margin", "writes = reads", "every_path"),
    Mutation(_LRN, "is_first ? 0 : left", "left", "local_response"),
    Mutation(_LRN, "lane < plan.margin + own && i < packs", "lane < plan.margin + own", "local_response", by="asan"),
    Mutation("window_plan.h", "p.reach * (in.backward ? 2 : 1)", "p.reach", "every_path"),
    Mutation("window_plan.h", "kWarp % (p.column.length / along_pack) == 0 ? 0 : 1", "0", "every_path"),
    Mutation(_LRN, "if (tile + gridDim.x < plan.tiles()) __syncthreads();", "", "local_response", by="trace"),
    Mutation(_LRN, "{near.column, far.column, column.before, column.after}",
             "{near.column, far.column, column.after, column.before}", "local_response"),
    Mutation(_LRN, "-2 * call.a * call.beta", "-2 * call.a", "local_response"),
    Mutation(_LRN, "span.begin + span.size + right, axis.length)", "span.begin + span.size + right, axis.length + 1)",
             "local_response"),
    Mutation("window_plan.h", "in.aligned && p.lanes", "p.lanes", "misaligned and local_response", by="asan"),
    Mutation("window_plan.h", "const int windows = in.backward ? 2 : 1;", "const int windows = 1;", "local_response"),
    Mutation(_LRN, "inverse[j] = r * r;", "inverse[j] = r;", "local_response"),
    Mutation(_LRN, "if (first + j * step < n) held", "held", "local_response", by="asan"),
    Mutation(_LRN, "kStaged ? 1 : sizeof(acc_t) / sizeof(T)", "1", "local_response_norm-intra", by="trace"),
    Mutation(_LRN, "reinterpret_cast<uintptr_t>(p) % kAccess == 0", "true",
             "local_response", by="trace"),
    # ---- what kernels share
    Mutation("pack.cuh", "j >= begin && j < end ? p[j]", "j >= begin && j <= end ? p[j]", "dropout", by="asan"),
    Mutation("pack.cuh", "if (j >= begin && j < end) p[j]", "if (j >= begin && j <= end) p[j]", "dropout"),
    Mutation("pack.cuh", "if (aligned && begin == 0 && end == n)", "if (true)", "dropout"),
    Mutation("reduce.cuh", "distance < lanes; distance *= 2", "distance < lanes / 2; distance *= 2", _PLANS),
    Mutation("reduce.cuh", "m2 = sum_of_squares - sum * d", "m2 = sum_of_squares", "drifts and batch_norm"),
    Mutation("activation.cuh", "bits |= static_cast<unsigned>(!(z[j] <= 0)) << j;",
             "bits |= static_cast<unsigned>(z[j] > 1e-3f) << j;", f"{_BATCH}-residual-relu"),
    Mutation("activation.cuh", "multiply_add(z[j], pdf, normal_cdf(z[j]))", "normal_cdf(z[j])", f"{_BATCH}-gelu"),
    # ---- batch, group and instance normalisation
    Mutation("slice_norm.cu", "  __syncthreads();\n  const int apart", "  const int apart", _PLANS),
    Mutation("slice_norm.cu", "    totals[i] = sum;\n  }\n  __syncthreads();", "    totals[i] = sum;\n  }", _PLANS),
    Mutation("slice_norm.cu", "        batch_[k] = 0;\n", "", _PLANS),
    Mutation("slice_norm.cu", "warp_sum(v, lanes);", "warp_sum(v);", f"float64 and {_BATCH}"),
    Mutation("slice_norm.cu", "  if (p.cluster > 1) cluster_sync();\n  const Moments m", "  const Moments m", _PLANS),
    *(Mutation("slice_norm.cu", "cluster_sync();  // no block leaves", ";  //", _PLANS, nth)
      for nth in range(2)),
    Mutation("slice_norm.cu", "    __syncthreads();\n    if (!*inexact) return;", "    if (!*inexact) return;", _PLANS,
             by="trace"),
    Mutation("slice_norm.cu", "p.cluster > 1 ? cluster_sync() : __syncthreads();", "__syncthreads();", _PLANS),
    Mutation("slice_norm.cu", "walk.channel + e, all);\n    }\n    __syncthreads();",
             "walk.channel + e, all);\n    }", _RUNS, by="trace"),
    Mutation("slice_norm.cu", "p.cluster * static_cast<int64_t>(blockDim.x) / kWarp",
             "static_cast<int64_t>(blockDim.x) / kWarp", _PLANS),
    Mutation("slice_norm.cu", "mine + (static_cast<int>(k) - rank * warps)", "mine", _PLANS),
    Mutation("slice_norm.cu", "int chunk = kFrom * walk.teams;", "int chunk = 0;", _PLANS),
    Mutation("slice_norm.cu", "chunk < chunks && part.window + lane < span_", "part.window + lane < span_", _PLANS,
             by="asan"),
    Mutation("slice_norm.cu", "part.window + lane < span_", "part.window + lane <= span_", _PLANS, by="asan"),
    Mutation("slice_norm.cu", "{gradient.slope}, {gradient.offset}", "{gradient.offset}, {gradient.slope}", _PLANS),
    Mutation("slice_norm.cu", "= gradient.slope;", "= gradient.offset;", _PLANS),
    *(Mutation("slice_norm.cu", "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", _PLANS, nth)
      for nth in range(2)),
    Mutation("slice_norm.cu", "team.is_there ? static_cast<int64_t>(D) * parts : 0", "static_cast<int64_t>(D) * parts",
             _PLANS, by="asan"),
    Mutation("slice_norm.cu", "team.is_there && k < D", "k < D", _PLANS, by="asan"),
    Mutation("slice_norm.cu", "if (!team.is_there || team.thread != 0) return;", "if (team.thread != 0) return;",
             _PLANS, by="asan"),
    Mutation("slice_norm.cu", "if (team.is_there && team.thread == 0)", "if (team.thread == 0)", _PLANS, by="asan"),
    Mutation("slice_norm.cu", "if (threads > kWarp) cuda::sum_of_warps(v, threads / kWarp, scratch);", "", _MERGES),
    Mutation("reduce.cuh", "first = warp / warps * warps", "first = 0", _MERGES),
    Mutation("slice_norm.cu", "  __syncthreads();\n  if (warp != 0 || c >= C) return;",
             "  if (warp != 0 || c >= C) return;", _RUNS),
    Mutation("slice_norm.cu", "    if (c >= C) continue;\n", "", _RUNS, by="asan"),
    Mutation("slice_norm.cu", "at.inside && walk.lane % lanes == 0", "at.inside", f"{_BATCH}-residual-relu",
             by="trace"),
    Mutation("slice_norm.cu", "min(8 / kN, walk.p.team)", "8 / kN", f"{_PLANS}-residual-relu"),
    Mutation("slice_norm.cu", "bits << where.first :", "bits :", f"{_PLANS}-residual-relu"),
    Mutation("slice_norm.cu", "(a.mask[where.byte]) >> where.first", "(a.mask[where.byte])",
             f"{_PLANS}-residual-relu"),
    Mutation("slice_norm.cu", "bool keep = rank == 0 && threadIdx.x == 0;", "bool keep = threadIdx.x == 0;", _PLANS,
             by="trace"),
    Mutation("slice_norm.cu", "if (!team.is_there || team.thread != 0) return;", "if (!team.is_there) return;", _PLANS,
             by="trace"),
    Mutation("slice_norm.cu", "if (rank == 0) keep_sums", "keep_sums", _RUNS, by="trace"),
    Mutation("slice_norm.cu", "if (rank == 0 && threadIdx.x == 0) keep_sums", "if (threadIdx.x == 0) keep_sums",
             _PLANS, by="trace"),
    Mutation("running.cuh", "if (c == 0 && batches)", "if (batches)", "batch_norm-statistics"),
    Mutation("slice_norm.cu", "  if (keep) a.update", "  a.update", "batch_norm-statistics"),
    Mutation("slice_norm.cu", "  a.update.average_and_count(team.group, m.mean, m.biased_variance());\n", "",
             "batch_norm-statistics"),
    Mutation("slice_norm.cu", "1.0 / sqrt(variance + a.eps)", "1.0 / sqrt(variance)", _PLANS),
    Mutation("slice_norm.cu", "clip(1 / (s.rstd * sigma), 1 / a.r_max", "clip(1 / (s.rstd * sigma), a.d_max",
             "batch_renorm"),
    Mutation("slice_norm.cu", "z[j] += r[j];", "z[j] -= r[j];", f"{_BATCH}-residual"),
    Mutation("slice_norm.cu", "a.r[c] * s.dz_xhat + a.d[c] * s.dz", "a.r[c] * s.dz_xhat", "batch_renorm"),
    Mutation("batch_norm.cu", "a.momentum, count / (count - 1)", "a.momentum, 1.0", "batch_norm-statistics"),
    Mutation("batch_norm.cu", "a.skip_nonfinite_stats || ", "", "batch_norm-skipped"),
    Mutation("batch_norm.cu", "std::isnan(a.momentum) || ", "", "batch_norm-statistics"),
    Mutation("batch_norm.cu", " || a.r)", ")", "batch_renorm", by="trace"),
    Mutation("batch_norm.cu", "  __syncthreads();\n  if (*nonfinite) return;", "  if (*nonfinite) return;",
             "batch_norm-skipped or batch_norm-statistics", by="trace"),
    Mutation("batch_norm.cu", "is_aligned(a.x, a.residual, a.y)", "is_aligned(a.x, a.y)",
             "misaligned and batch", by="asan"),
    Mutation("batch_norm.cu", "is_aligned(a.x, a.dy, a.residual, a.dx, a.dresidual)",
             "is_aligned(a.x, a.dy, a.residual, a.dx)", "misaligned and batch and dresidual", by="asan"),
    Mutation("batch_norm.cu", "take<double>(a.shape.C)", "take<double>(1)", "batch_norm-statistics"),
    Mutation("slice_norm.cu", "    if (*inexact) exact_moments(walk, groups, store);\n", "", "scaled and group_norm"),
    Mutation("slice_norm.cu", "    exact_moments(walk, 1, [&](int, const Moments& m) { of_warps[0] = m; });\n", "",
             "scaled and batch_norm"),
    Mutation("slice_norm.cu", "    if (threadIdx.x % kWarp == 0) of_warps[warp] = Moments{};\n", "",
             "batch_norm-warps-scaled"),
    Mutation("slice_norm.cu", " || (sum_of_squares < 1e-30 && (sum != 0 || shift != 0))", "",
             "scaled and (batch_norm or group_norm)"),
    # synchronised: statistics and sums leave the kernels in between
    Mutation("slice_norm.cu", "if (a.variance) a.variance[i] = variance;", "", "sync_batch_norm"),
    Mutation("batch_norm.cu", "const_cast<double*>(a.given_rstd)", "const_cast<double*>(a.given_mean)",
             "sync_batch_norm"),
    Mutation("batch_norm.cu", "!a.training && a.given_mean == nullptr", "!a.training", "sync_batch_norm"),
    Mutation("slice_norm.cu", "a.sums[C + c] = s.dz_xhat;", "a.sums[C + c] = s.dz;", "sync_batch_norm"),
    Mutation("batch_norm.cu", "s.count = a.given_sums ? a.count : ", "s.count = ", "two-processes"),
    Mutation("batch_norm.cu", "a.dx && a.given_sums == nullptr", "a.dx", "two-processes"),
    Mutation("slice_norm.cu", "kernel.weight(c) * a.given_sums[p.C + c]", "a.given_sums[p.C + c]", "two-processes"),
    # what the plans decide
    Mutation("plan.h", "return p.shared.all <= in.shared;", "return true;", "every_path and group_norm"),
    Mutation("plan.h", "warps * 24", "24", _PLANS, by="asan"),
    Mutation("plan.h", "std::max<int64_t>(p.entries, warps) * 16", "p.entries * 16", _PLANS, by="asan"),
    Mutation("plan.h", "p.chunks_per_block() * 2 * acc", "p.chunks_per_block() * acc", _RUNS, by="asan"),
    Mutation("plan.h", ": warps * std::min(", ": std::min(", _PLANS, by="trace"),
    Mutation("sizes.h", "/ d + 1), bits - 1}", "/ d), bits - 1}", _PLANS),
    Mutation("plan.h", "if (!aligned || element == 8) return 1;", "if (element == 8) return 1;", "misaligned and batch",
             by="asan"),
    Mutation("plan.h", "p.mask_row_bytes = ceil_divide(S, 8);", "p.mask_row_bytes = S / 8;", f"{_PLANS}-residual-relu"),
    Mutation("row_plan.h", "while (kWarp * p.packs < n)", "while (2 * kWarp * p.packs < n)", "layer_norm"),
    Mutation("row_plan.h", "ceil_divide(ceil_divide(n, p.cluster), int64_t{kWarp} * p.packs)",
             "(ceil_divide(n, p.cluster) / (kWarp * p.packs))", "layer_norm or rms_norm"),
    # compiled for sm_80
    Mutation("launch.cuh", "cluster_rank() { return 0; }", "cluster_rank() { return 1; }", "compiled_for"),
    Mutation("launch.cuh", "std::min(major, compiled_for / 10) >= 9", "major >= 9", "compiled_for"),
    Mutation("launch.cuh", "> most_dynamic_shared(kSharedWithoutAsking)", "> kSharedWithoutAsking", "every_path"),
    # ---- layer and RMS normalisation
    Mutation("layer_norm.cu", "slot = turn % 2 * kMostSums", "slot = 0", "layer_norm", by="trace"),
    Mutation("layer_norm.cu", "      __syncthreads();\n#pragma unroll", "#pragma unroll", "layer_norm"),
    Mutation("layer_norm.cu", "lane < warps ?", "lane <= warps ?", "layer_norm"),
    Mutation("layer_norm.cu", "      cluster_sync();\n#pragma", "      __syncthreads();\n#pragma", "layer_norm"),
    Mutation("layer_norm.cu", "if (cluster_size() > 1) cluster_sync();", "", "layer_norm", by="asan"),
    Mutation("layer_norm.cu", "lane == 0 && column < N) row", "lane == 0 && column <= N) row", "layer_norm-residual"),
    Mutation("layer_norm.cu", "m2 -= deviations[0] * shift;", "", "far-above"),
    Mutation("layer_norm.cu", "if (row >= a.M) return;", "if (row > a.M) return;", "layer_norm", by="asan"),
    Mutation("layer_norm.cu", "if (is_inside(k) && row < a.M) to[k]", "if (is_inside(k)) to[k]",
             "layer_norm", by="asan"),
    Mutation("layer_norm.cu", "    __syncthreads();\n    for (int64_t column = threadIdx.x; column < a.N;",
             "    for (int64_t column = threadIdx.x; column < a.N;", "layer_norm"),
    Mutation("layer_norm.cu", "multiply_add(xhat[j], mean_g_xhat, mean_g)) * rstd", "multiply_add(xhat[j], mean_g, "
             "mean_g_xhat)) * rstd", "layer_norm"),
    Mutation("layer_norm.cu", "sums[threadIdx.x] = sum;\n  __syncthreads();", "sums[threadIdx.x] = sum;", "layer_norm"),
    Mutation("layer_norm.cu", "bits <<= lane * kPack;", "", "layer_norm-residual-relu"),
    Mutation("layer_norm.cu", "row[column / 8]) >> column % 8", "row[column / 8])", "layer_norm-residual-relu"),
    # ---- weight and spectral normalisation
    Mutation("weight_norm.cu", "      __syncthreads();\n      double of_column", "      double of_column",
             "weight_norm"),
    Mutation("weight_norm.cu", "if (!is_exact<T>(total[0])) add(0.0, false);", "", "scaled and weight_norm"),
    Mutation("weight_norm.cu", "part * a.N / a.parts, end = (part + 1)", "part * a.N / a.parts, end = part",
             "every_path and weight_norm"),
    Mutation("weight_plan.h", "in.aligned && S % window == 0", "in.aligned", "weight_norm", by="asan"),
    Mutation("weight_norm.cu", "min(lane / S * S + k, kWarp - 1)", "min(lane / S * S, kWarp - 1)", "weight_norm"),
    Mutation("spectral_norm.cu", "const acc_t by = u[i];", "const acc_t by = u[i - begin];", "power"),
    Mutation("spectral_norm.cu", "part * kPartRows < h; part += gridDim.y", "part * kPartRows < h; part = h", "power"),
    Mutation("spectral_norm.cu", "if (++c == a.C) {", "if (++c > a.C) {", "spectral_norm"),
    Mutation("spectral_norm.cu", "part < parts; ++part) value", "part < parts - 1; ++part) value", "power"),
)
# fmt: on

# Quick ones for the normal tests, one a mode.
SAMPLE = [m for m in MUTATIONS if m.old in (
    "in_tile / kElementsPerPhilox)", "at.inside && walk.lane % lanes == 0", "row < rows && c < call.C ?",
)]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    caught: tuple[str, ...]  # by these modes
    problem: str = ""  # why it could not be tried


def _run(mode: str, csrc: Path, *what: str) -> subprocess.CompletedProcess[str]:
    environment = driver.asan_environment() if mode == "asan" else dict(os.environ)
    environment |= {"FASTNORM_CUDA_ON_CPU_CSRC": str(csrc), "FASTNORM_CUDA_IN_FULL": "1", "PYTHONUNBUFFERED": "1"}
    if mode == "asan":
        environment["FASTNORM_CUDA_UNDER_SANITIZERS"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "--no-header", "--capture=sys"]
    return subprocess.run([*command, *what], cwd=TESTS.parent, env=environment, capture_output=True, text=True)


_unfit: dict[str, set[str]] = {mode: set() for mode in MODES}  # tests that fail on the sources as they are


@cache
def _passes_unchanged(test: str, mode: str) -> bool:
    return _run(mode, SOURCES, test).returncode == 0


def _caught(tests: str, mode: str, csrc: Path) -> bool:
    """Whether a test fails that passes on the sources as they are."""
    # The traffic is counted in mode trace, under names that do not say so.
    files = ["tests/test_cuda_on_cpu.py", *(["tests/test_cuda_traffic.py"] if mode == "trace" else [])]
    also = {"random": " or drifts", "trace": " or traffic"}.get(mode, "")
    chosen = f"({tests}) and ({mode}{also}) and not sanitizers"
    while True:
        done = _run(mode, csrc, "-k", chosen, *(f"--deselect={test}" for test in _unfit[mode]), *files)
        if "BuildError" in done.stdout:
            raise RuntimeError("does not compile: " + "".join(re.findall(r"^E .*error: .*\n", done.stdout, re.M)[:1]))
        begun = re.findall(r"^(tests/\S+::.*?)(?: [A-Z]+ .*)?$", done.stdout, re.M)
        if not begun:
            raise RuntimeError(f"no test ran for -k {chosen!r}: {done.stdout[-300:]}")
        if done.returncode == 0:
            return False
        last = begun[-1].strip()
        if _passes_unchanged(last, mode):
            return True
        _unfit[mode].add(last)


def try_mutation(mutation: Mutation, every_mode: bool = False) -> Outcome:
    """By the first mode that catches it, or by all that do."""
    caught: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastnorm_mutation_") as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(SOURCES, csrc, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
        try:
            mutation.apply(csrc)
            for mode in sorted(MODES, key=lambda mode: mode != mutation.by):
                if _caught(mutation.tests, mode, csrc):
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
    for test in sorted(set().union(*_unfit.values())):
        print(f"left out, for it fails without a bug: {test}")
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
