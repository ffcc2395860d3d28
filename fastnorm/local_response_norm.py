"""Local response normalisation: autograd function, functional and module."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_unary

from fastnorm import _C, compile
from fastnorm.double_backward import double_backward
from fastnorm.op import apply_of, carry
from fastnorm.overrides import overridden, recorded_call
from fastnorm.transforms import (
    fold_samples,
    is_for_kernels,
    is_for_ops,
    pull_back,
    push_forward,
    refuse_nested_forward_mode,
)

Region = Literal["inter", "intra"]
Convention = Literal["torch", "paper"]


# size, alpha, beta, k, region, convention, as one argument: each argument of an autograd function costs time.
_Setting = tuple[int, float, float, float, Region, Convention]


class LocalResponseNormFunction(torch.autograd.Function):
    """y = x / (k + a * sum x^2)^beta, see :func:`local_response_norm`.

    Kept for backward: x, from which the sums are computed anew.
    """

    @staticmethod
    def forward(input: Tensor, setting: _Setting) -> Tensor:
        return _C.local_response_norm_forward(input, *setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Setting], output: Tensor) -> None:
        input, ctx.setting = inputs
        ctx.save_for_backward(input)
        ctx.save_for_forward(input)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        if is_for_kernels(dy):
            return _C.local_response_norm_backward(dy, input, *ctx.setting), None
        if is_for_ops(dy):
            return _backward_op(dy, input, *ctx.setting), None
        return LocalResponseNormBackwardFunction.apply(dy, input, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        (input,) = ctx.saved_tensors
        refuse_nested_forward_mode()
        return push_forward(lambda x: _composite(x, *ctx.setting), (input,), (dx,))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], input: Tensor, setting: _Setting) -> tuple[Tensor, int]:
        (x,) = fold_samples(info.batch_size, in_dims, input)
        return LocalResponseNormFunction.apply(x, setting).unflatten(0, (info.batch_size, -1)), 0


class LocalResponseNormBackwardFunction(torch.autograd.Function):
    """The gradient of :class:`LocalResponseNormFunction` as a function that can itself be differentiated."""

    @staticmethod
    def forward(dy: Tensor, input: Tensor, setting: _Setting) -> Tensor:
        return _C.local_response_norm_backward(dy, input, *setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Setting], output: Tensor) -> None:
        dy, input, setting = inputs
        ctx.gradient = lambda dy, x: pull_back(lambda t: _composite(t, *setting), (x,), dy)[0]
        ctx.save_for_backward(dy, input)
        ctx.save_for_forward(dy, input)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return *pull_back(ctx.gradient, ctx.saved_tensors, ddx), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_nested_forward_mode()
        primals = ctx.saved_tensors
        along = [torch.zeros_like(t) if d is None else d for t, d in zip(primals, tangents, strict=False)]
        return push_forward(ctx.gradient, primals, along)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], dy: Tensor, input: Tensor, setting: _Setting
    ) -> tuple[Tensor, int]:
        folded = fold_samples(info.batch_size, in_dims, dy, input)
        return LocalResponseNormBackwardFunction.apply(*folded, setting).unflatten(0, (info.batch_size, -1)), 0


def window(size: int, convention: str) -> tuple[int, int]:
    """How many elements before and after its own a window has."""
    return size // 2, (size - 1) // 2 if convention == "torch" else size // 2


def _composite(
    input: Tensor, size: int, alpha: float, beta: float, k: float, region: Region, convention: Convention
) -> Tensor:
    """The op in torch's ops, for every region and convention, differentiable any number of times."""
    dims = (1,) if region == "inter" else (2, 3)
    before, after = window(size, convention)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    sums = x * x
    for dim in dims:
        edge = sums.shape[dim] - 1  # further out there is nothing to sum
        padding = [0, 0] * (sums.dim() - 1 - dim) + [min(before, edge), min(after, edge)]
        sums = F.pad(sums, padding).unfold(dim, min(before, edge) + 1 + min(after, edge), 1).sum(-1)
    scale = k + sums * (alpha / size ** len(dims) if convention == "torch" else alpha)
    return (x / scale**beta).to(input.dtype)


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    region: Region = "inter",
    convention: Convention = "torch",
) -> Tensor:
    """Local response normalisation: divides each element by a power of the energy around it.

        y = x / scale^beta,   scale = k + a * sum of x^2 over the window

    The window runs along the channels (``region="inter"``) or is a square in the plane of one channel (``"intra"``, as
    Caffe's WITHIN_CHANNEL). Beyond the edges there are zeros. From Krizhevsky, Sutskever & Hinton 2012, "ImageNet
    classification with deep convolutional neural networks", section 3.3.

    ``convention="torch"``: the window of element i is i - size // 2 .. i + (size - 1) // 2, and a is alpha over the
    number of its elements, size or size^2, as in torch, Caffe and oneDNN. ``"paper"``: the window is i - size // 2 ..
    i + size // 2, so that an even size has size + 1 elements, and a = alpha.

    Only x is kept for backward. Squares and sums of bfloat16 and float16 are float32, so that they do not overflow.

    Args:
        input: (N, C, *) with at least one * dimension, for ``region="intra"`` (N, C, H, W); float64, float32, bfloat16
            or float16. Contiguous and channels_last tensors are read as they lie, other strides take one copy. The
            output has the input's layout.
        size: of the window in elements, at least 1; may exceed the tensor.
        alpha: in units of input^-2, if k has none.
        beta: any real number; 0.5, 0.75 and 1 are the fast ones, 0 copies the input.
        k: added to the sum. With k = 0 a window of zeros gives 0 / 0 = NaN, as in torch.
        region: ``"inter"`` or ``"intra"``.
        convention: ``"torch"`` or ``"paper"``.

    Raises:
        ValueError: too few dimensions for the region; an unknown region or convention.
        RuntimeError: size below 1.

    Example:
        >>> x = torch.tensor([2.0, 1.0, 2.0]).view(1, 3, 1)
        >>> y = fastnorm.functional.local_response_norm(x, 2, alpha=1.0, beta=1.0, k=0.0, convention="paper")
        >>> y[0, 1, 0]  # 1 / (4 + 1 + 4)
        tensor(0.1111)
    """
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(local_response_norm, locals())
    op = _local_response_norm if input.dim() > 3 else _local_response_norm_of_sequences
    return op(input, size, alpha, beta, k, region, convention)


_apply = apply_of(LocalResponseNormFunction)


def _eager_local_response_norm(input: Tensor, *setting: Any) -> Tensor:
    if input.requires_grad and torch.is_grad_enabled():
        return _apply(input, setting)
    return _C.local_response_norm_forward(input, *setting)


def _torch_local_response_norm(
    input: Tensor, size: int, alpha: float, beta: float, k: float, region: Region, convention: Convention
) -> Tensor:
    _check_names("local_response_norm", region, convention)
    if region == "inter" and convention == "torch":
        return F.local_response_norm(input, size, alpha, beta, k)
    dims = 3 if region == "inter" else 4
    if input.dim() < dims or (region == "intra" and input.dim() > dims):
        shape = "(N, C, *)" if region == "inter" else "(N, C, H, W)"
        raise ValueError(
            f"local_response_norm: input must have shape {shape} for region={region!r}, got {list(input.shape)}"
        )
    if size < 1:
        raise RuntimeError(f"local_response_norm: size must be at least 1, got {size}")
    return _composite(input, size, alpha, beta, k, region, convention) if input.numel() else input.clone()


def _check_names(op: str, region: str, convention: str) -> None:
    if region not in ("inter", "intra"):
        raise ValueError(f"{op}: region must be 'inter' or 'intra', got {region!r}")
    if convention not in ("torch", "paper"):
        raise ValueError(f"{op}: convention must be 'torch' or 'paper', got {convention!r}")


def _transformed_local_response_norm(input: Tensor, *setting: Any) -> Tensor:
    return LocalResponseNormFunction.apply(input, setting)


# ---- as ops of the dispatcher


def _traced_local_response_norm(input: Tensor, *setting: Any) -> Tensor:
    *_, region, convention = setting
    _check_names("local_response_norm", region, convention)
    return _forward_op(input, *setting)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.setting = inputs
    ctx.save_for_backward(input)


def _op_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dy, *ctx.saved_tensors, *ctx.setting), *[None] * 6


_SCHEMA = "int size, float alpha, float beta, float k, str region, str convention) -> Tensor"


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, input, *ctx.setting = inputs
    ctx.save_for_backward(dy, input)


def _second_gradients(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, input = ctx.saved_tensors
    return *double_backward(lambda x: _composite(x, *ctx.setting), [input], dy, [ddx]), *[None] * 6


_forward_op = compile.register(
    f"local_response_norm(Tensor input, {_SCHEMA}",
    _C.local_response_norm_forward,
    lambda input, *_: compile.empty_in_layout(input),
    _op_gradient,
    _setup_context,
)
_backward_op = compile.register(
    f"local_response_norm_backward(Tensor grad_output, Tensor input, {_SCHEMA}",
    _C.local_response_norm_backward,
    lambda dy, input, *_: compile.empty_in_layout(input),
    _second_gradients,
    _keep_for_second,
)
# torch's own pools (N, C, L) otherwise than (N, C, *), which autocast on a CPU can tell
_local_response_norm, _local_response_norm_of_sequences = (
    carry(
        "local_response_norm",
        eager=_eager_local_response_norm,
        transformed=_transformed_local_response_norm,
        traced=_traced_local_response_norm,
        torch_op=_torch_local_response_norm,
        autocast_as=("pow.Tensor_Scalar", pooling),
    )
    for pooling in ("avg_pool3d", "avg_pool2d")
)


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm on fastnorm's kernels: the same arguments and numbers.

        y = x * (k + alpha' * sum of x^2 over a window)^-beta

    with alpha' = alpha / window size, or alpha in the paper's convention; see
    :func:`fastnorm.functional.local_response_norm`, which has the windows and the source.

    Args:
        size, alpha, beta, k: as torch.nn.LocalResponseNorm has them.
        region: "inter" (along the channels) or "intra" (a square of size x size within a channel).
        convention: "torch", or "paper" for the window and the alpha of the AlexNet paper.

    Shape:
        input: (N, C, *), for region="intra" (N, C, H, W); output the same.

    Raises:
        ValueError: an unknown region or convention.

    Example:
        >>> norm = fastnorm.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0, convention="paper")
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """

    __prepare_scriptable__ = compile.refuse_scripting

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        region: Region = "inter",
        convention: Convention = "torch",
    ) -> None:
        _check_names(type(self).__name__, region, convention)
        super().__init__(size, alpha, beta, k)
        self.region = region
        self.convention = convention

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function_unary(input) and (call := recorded_call(self, input)) is not None:
            return call
        return local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, region=self.region, convention=self.convention
        )

    def extra_repr(self) -> str:
        extra = "" if self.region == "inter" else f", region={self.region!r}"
        return (
            super().extra_repr() + extra + ("" if self.convention == "torch" else f", convention={self.convention!r}")
        )
