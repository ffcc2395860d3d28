"""What `make sanitize-quick` chooses."""

from __future__ import annotations

from cases import CASES
from sanitize import QUICK_CASES


def test_every_op_is_chosen() -> None:
    chosen = {case.name: case.op for case in CASES if case.name in QUICK_CASES}
    assert set(chosen) == set(QUICK_CASES)
    assert set(chosen.values()) == {case.op for case in CASES}
