"""A hundred drawn calls of each op, the same at every run; `make fuzz` draws as many others as wanted."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from fuzz.call import Call, check
from fuzz.ops import OPS
from fuzz.pointwise import DROPOUTS
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import fastnorm.functional as fn

few = settings(
    max_examples=40 if "ATEN_CPU_CAPABILITY" in os.environ else 120,  # where test_isa.py forces an instruction set
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("op", OPS)
def test_against_float64(op: str) -> None:
    few(given(OPS[op])(check))()


def test_every_functional_is_drawn() -> None:
    assert {*OPS, *DROPOUTS} - {"dropouts"} == set(fn.__all__)


@pytest.mark.parametrize("op", ("batch_norm", "layer_norm", "local_response_norm"))
@pytest.mark.parametrize("result", ("y", "gradient"))
def test_an_error_of_one_in_a_hundred_thousand_is_found(op: str, result: str) -> None:
    """In float32, whose numbers are a hundred times finer: the bounds are narrow enough to see it."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * (1 + 1e-5) if result == "y" else x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy * (1 + 1e-5) if result == "gradient" else dy

    def check_scaled(call: Call) -> None:
        hypothesis.assume(call.dy.dtype == torch.float32)
        run = call.run
        call.run = lambda *leaves: Scaled.apply(run(*leaves))
        check(call)

    with pytest.raises(AssertionError, match="wrong, by up to"):
        few(given(OPS[op])(check_scaled))()
