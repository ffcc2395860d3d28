"""What the examples in docstrings may name without an import."""

from __future__ import annotations

import pytest
import torch

import fastnorm


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, fastnorm=fastnorm)
