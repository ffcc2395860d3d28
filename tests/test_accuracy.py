"""A part of ``make accuracy``: on hard inputs no op is further from float64 than torch's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accuracy import INPUTS, SLACK, Row, accuracy_cases, rows
from cases import Case

HARD = ("mean / std 1e+05", "scale 1e-30", "scale 1e+20", "large constant", "denormals", "one outlier of 1e30", "a NaN")
BY_NAME = {case.name: case for case in accuracy_cases()}


def hard(case: Case, *names: str) -> list[Row]:
    return list(rows([case], {name: INPUTS[name] for name in names}, draws=1))


@pytest.mark.parametrize("name", BY_NAME)
def test_no_worse_than_torch(name: str) -> None:
    worse = [row for row in hard(BY_NAME[name], *HARD) if row.worse]
    assert not worse, worse


def test_an_error_is_seen() -> None:
    """Moments of E[x^2] - E[x]^2 lose every digit where the mean is far above the standard deviation; a lost NaN."""
    case = BY_NAME["layer_norm"]

    def naive(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        variance = (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
        return (x - x.mean(-1, keepdim=True)) / (variance.abs() + 1e-5).sqrt() * weight + bias

    worse = {row.result for row in hard(replace(case, fastnorm=naive, torch=case.fastnorm), HARD[0]) if row.worse}
    assert "y" in worse and "dx" in worse
    forgetful = replace(case, fastnorm=lambda x, *rest: case.fastnorm(x.nan_to_num(), *rest))
    lost = next(row for row in hard(forgetful, "a NaN") if row.result == "y")
    assert lost.ours == math.inf and lost.worse and lost.torchs <= SLACK
