"""Settings that every test shares: threads, and warnings that a test must expect to pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastnorm


@pytest.fixture(autouse=True)
def _no_fallback_and_two_threads() -> Iterator[None]:
    """A kernel that quietly hands its work to torch fails its test; so that the threads are used, there are two."""
    fastnorm.set_fallback("error")
    torch.set_num_threads(2)
    yield
    fastnorm.set_fallback("warn")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, fastnorm=fastnorm)
