"""``python -m fuzz CASES [--seed N] [--op NAME]``: that many drawn calls, each op in turn, until one fails."""

from __future__ import annotations

import argparse
import sys
import time

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

import fastnorm

from .call import Call, check
from .ops import OPS

# hypothesis keeps what it has drawn in a round, so that it draws nothing twice: longer rounds slow down
_ROUND = 500


def run(op: str, seed: int, cases: int) -> int:
    """One round of an op; how many calls were checked. Raises what the smallest failing call raises."""
    done = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(OPS[op])
    def drawn(call: Call) -> None:
        nonlocal done
        check(call)
        done += 1

    drawn()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("cases", type=int, help="how many calls to check")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each next one has the next seed")
    parser.add_argument("--op", choices=OPS, help="this op alone")
    arguments = parser.parse_args()
    fastnorm.set_fallback("error")
    torch.set_num_threads(1)  # the calls are small

    names = [arguments.op] if arguments.op else list(OPS)
    done, seed, began = dict.fromkeys(names, 0), arguments.seed, time.monotonic()
    failed = 0
    while sum(done.values()) < arguments.cases and not failed:
        for op in names:
            try:
                done[op] += run(op, seed, min(_ROUND, arguments.cases))
            except Exception as error:
                failed += 1
                notes = "\n".join(getattr(error, "__notes__", []))  # the call, as hypothesis has shrunk it
                print(f"FAILED {op}, seed {seed}: {type(error).__name__}: {error}\n{notes}", flush=True)
        seed += 1
        print(f"{sum(done.values())} cases, {time.monotonic() - began:.0f} s", flush=True)
    print(", ".join(f"{op} {count}" for op, count in done.items()))
    print(f"{sum(done.values())} cases, {failed} ops with a failure, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
