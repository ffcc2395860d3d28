"""weight_norm and spectral_norm as torch.nn.utils.parametrizations has them, each one kernel forward and one back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from fastnorm import _C, compile
from fastnorm.op import carry
from fastnorm.transforms import is_for_kernels, loop_over_batch

__all__ = ["spectral_norm", "weight_norm"]

Model = TypeVar("Model", bound=nn.Module)


# ---- weight_norm: its autograd function is in csrc/weight_norm.cpp


def _composite_weight_norm(g: Tensor, v: Tensor, dim: int) -> Tensor:
    """Of elementary ops: torch's own, one op, has neither forward-mode derivatives nor complex numbers."""
    x = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
    return (x * (g / _lengths(x, dim))).to(v.dtype)


def _lengths(x: Tensor, dim: int) -> Tensor:
    """The norm over all dimensions but ``dim``, over all if that is -1."""
    others = [d for d in range(x.dim()) if dim == -1 or d != dim % x.dim()]
    return torch.linalg.vector_norm(x, dim=others, keepdim=True) if others else x.abs()


def _eager_weight_norm(g: Tensor, v: Tensor, dim: int) -> Tensor:
    return _C.weight_norm(v, g, dim)


def _keep_weight_norm(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    g, v, ctx.dim = inputs
    ctx.save_for_backward(g, v)


def _weight_norm_gradients(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    """In torch's ops, for a compiler to fuse: the native one is a node of autograd, with no name of its own.

    dg = <dw, v> / ||v||,   dv = g / ||v|| * (dw - v * <dw, v> / ||v||^2)
    """
    g, v = ctx.saved_tensors
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    x, dx = v.to(wide), dw.to(wide)
    norm = _lengths(x, ctx.dim)
    direction = x / norm
    dg = (dx * direction).sum_to_size(norm.shape)
    dv = (dx - direction * dg) * (g.to(wide).view(norm.shape) / norm)
    return dg.view(g.shape).to(g.dtype), dv.to(v.dtype), None


_traced_weight_norm = compile.register(
    "weight_norm(Tensor g, Tensor v, int dim) -> Tensor",
    _eager_weight_norm,
    lambda g, v, dim: compile.empty_in_layout(v),
    _weight_norm_gradients,
    _keep_weight_norm,
)
_weight_norm = carry(
    "weight_norm",
    eager=_eager_weight_norm,
    transformed=_composite_weight_norm,
    traced=_traced_weight_norm,
    torch_op=_composite_weight_norm,
)


class _WeightNorm(torch_parametrizations._WeightNorm):
    """torch's parametrization, with the kernel in its forward."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return _weight_norm(weight_g, weight_v, self.dim)


def weight_norm(module: Model, name: str = "weight", dim: int | None = 0) -> Model:
    """Weight normalisation (Salimans & Kingma 2016, arXiv:1602.07868) of a parameter: direction and length apart.

        w = g * v / ||v||

    The norm is over all dimensions but ``dim``, so by default one for each output channel. The parameter becomes
    ``parametrizations.<name>.original0``, g, and ``.original1``, v, as with
    torch.nn.utils.parametrizations.weight_norm: a state_dict of either loads into the other, and so does one of the
    older torch.nn.utils.weight_norm (``<name>_g``, ``<name>_v``). A slice of zeros gives NaN, as in torch.
    torch.nn.utils.parametrize.remove_parametrizations undoes it.

    Args:
        module: what has the parameter.
        name: the parameter's name; float64, float32, bfloat16 or float16. Any dense layout is kept.
        dim: the dimension that g has; None or -1 for one norm of the whole tensor (so torch reads -1).

    Returns:
        The module itself.

    Raises:
        AttributeError: no parameter of that name.
        IndexError: dim is no dimension of the parameter.

    Example:
        >>> linear = fastnorm.parametrizations.weight_norm(torch.nn.Linear(20, 40))
        >>> linear.parametrizations.weight.original0.shape
        torch.Size([40, 1])
    """
    parametrize.register_parametrization(module, name, _WeightNorm(dim), unsafe=True)

    def accept_old_names(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        old = f"{prefix}{name}_g", f"{prefix}{name}_v"
        if all(key in state_dict for key in old):
            for i, key in enumerate(old):
                state_dict[f"{prefix}parametrizations.{name}.original{i}"] = state_dict.pop(key)

    module._register_load_state_dict_pre_hook(accept_old_names)
    return module


# ---- spectral_norm


class SpectralNormFunction(torch.autograd.Function):
    """y = weight / (u^T weight v), after ``iterations`` of the power method on u and v, see :func:`spectral_norm`.

    Kept for backward: the weight, u and v as they were used, and sigma.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, iterations: int, dim: int, eps: float) -> Tensor:
        y, kept_u, kept_v, sigma = _C.spectral_norm_forward(weight, u, v, iterations, dim, eps)
        ctx.save_for_backward(weight, kept_u, kept_v, sigma)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma = ctx.saved_tensors
        if dy.layout != torch.strided:  # of an embedding with sparse gradients
            dy = dy.to_dense()
        if is_for_kernels(dy):
            gradient = _C.spectral_norm_backward
        else:
            gradient = _spectral_norm_backward_op if is_dynamo_compiling() else _gradient
        return gradient(dy, weight, u, v, sigma, ctx.dim), None, None, None, None, None


class PowerMethodFunction(torch.autograd.Function):
    """The u and v that a weight inside of a transform is divided with; to derivatives they are constants."""

    @staticmethod
    def forward(weight: Tensor, u: Tensor, v: Tensor, iterations: int, dim: int, eps: float) -> tuple[Tensor, Tensor]:
        _, kept_u, kept_v, _ = _C.spectral_norm_forward(weight, u, v, iterations, dim, eps)
        return kept_u, kept_v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * 6

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], weight: Tensor, u: Tensor, v: Tensor, iterations: int, *rest: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        if iterations and None in in_dims[1:3]:
            raise RuntimeError(
                "spectral_norm: u and v that all elements of vmap's batch share cannot be updated by each; use eval(), "
                "or stack one for each element"
            )
        return loop_over_batch(PowerMethodFunction, info, in_dims, weight, u, v, iterations, *rest)


def _divided(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """weight / (u^T weight v) in torch's ops."""
    w = weight.to(u.dtype)
    return (w / torch.dot(u, torch.mv(w.movedim(dim, 0).flatten(1), v))).to(weight.dtype)


def _gradient(dy: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int) -> Tensor:
    """The gradient in torch's ops, differentiable any number of times.

    dweight = (dy - u v^T <dy, y>) / sigma,   y = weight / sigma,   sigma = <u v^T, weight>
    """
    w, d = weight.to(u.dtype), dy.to(u.dtype)
    outer = torch.outer(u, v).view(w.movedim(dim, 0).shape).movedim(0, dim)
    sigma = (outer * w).sum()  # not as it was kept: it depends on the weight
    return ((d - outer * ((d * w).sum() / sigma)) / sigma).to(weight.dtype)


class _SpectralNorm(torch_parametrizations._SpectralNorm):
    """torch's parametrization, with the kernel in its forward."""

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:  # its norm is known: nothing to approximate
            return super().forward(weight)
        return _spectral_norm(weight, self)


def _torch_spectral_norm(weight: Tensor, module: _SpectralNorm) -> Tensor:
    return torch_parametrizations._SpectralNorm.forward(module, weight)


def _setting(module: _SpectralNorm) -> tuple[Tensor, Tensor, int, int, float]:
    """u, v, iterations, dim, eps."""
    buffers = module._buffers
    iterations = module.n_power_iterations if module.training else 0
    return buffers["_u"], buffers["_v"], iterations, module.dim, module.eps


def _eager_spectral_norm(weight: Tensor, module: _SpectralNorm) -> Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        return SpectralNormFunction.apply(weight, *_setting(module))
    return _C.spectral_norm_forward(weight, *_setting(module))[0]


def _traced_spectral_norm(weight: Tensor, module: _SpectralNorm) -> Tensor:
    u, v, iterations, *rest = _setting(module)
    y, _, _, _, *new = _spectral_norm_op(weight, u, v, iterations, *rest)
    if iterations > 0:
        compile.write_back((u, v), new)
    return y


def _transformed_spectral_norm(weight: Tensor, module: _SpectralNorm) -> Tensor:
    u, v = PowerMethodFunction.apply(weight, *_setting(module))
    return _divided(weight, u, v, module.dim)


_spectral_norm = carry(
    "spectral_norm",
    eager=_eager_spectral_norm,
    transformed=_transformed_spectral_norm,
    traced=_traced_spectral_norm,
    torch_op=_torch_spectral_norm,
)


def _kernel(weight: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    new = compile.clones((u, v))
    return *_C.spectral_norm_forward(weight, *new, *rest), *new


def _fake(weight: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = [t.new_empty(t.shape, dtype=wide) for t in (u, v)]
    sigma = weight.new_empty(1, dtype=torch.float64)
    return compile.empty_in_layout(weight), *kept, sigma, *compile.clones((u, v))


def _fake_backward(dy: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int) -> Tensor:
    return compile.empty_in_layout(weight) if dim in (0, -weight.dim()) else compile.empty_contiguous(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, _, _, _, ctx.dim, _ = inputs
    ctx.save_for_backward(weight, *output[1:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _op_gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    weight, u, v, sigma = ctx.saved_tensors
    gradient = _gradient if torch.is_grad_enabled() else _spectral_norm_backward_op
    return gradient(dy, weight, u, v, sigma, ctx.dim), *[None] * 5


_spectral_norm_op = compile.register(
    "spectral_norm(Tensor weight, Tensor u, Tensor v, int iterations, int dim, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _op_gradient,
    _setup_context,
)
_spectral_norm_backward_op = compile.register(
    "spectral_norm_backward(Tensor grad_output, Tensor weight, Tensor u, Tensor v, Tensor sigma, int dim) -> Tensor",
    _C.spectral_norm_backward,
    _fake_backward,
)


def spectral_norm(
    module: Model, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Model:
    """Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957; Yoshida & Miyato 2017, arXiv:1705.10941).

        y = weight / sigma,   sigma = u^T W v,   W the weight as a matrix whose rows are ``dim``

    In training, every time the weight is asked for, u and v first take a step of the power method towards the first
    singular vectors of W (t = W v, u = t / max(|t|, eps), s = W^T u, v = s / max(|s|, eps)); in evaluation they stay.
    Backward takes them for constants. The parameter becomes ``parametrizations.<name>.original``, u and v the buffers
    ``parametrizations.<name>.0._u`` and ``._v``, as with torch.nn.utils.parametrizations.spectral_norm: a state_dict of
    either loads into the other. torch.nn.utils.parametrize.remove_parametrizations undoes it.

    Args:
        module: what has the parameter.
        name: the parameter's name; float64, float32, bfloat16 or float16. A vector is divided by its norm.
        n_power_iterations: steps of the power method each time.
        eps: the least divisor of t and s, in their units.
        dim: the dimension of the outputs; 0 if None, but 1 for a transposed convolution.

    Returns:
        The module itself.

    Raises:
        ValueError: no parameter of that name; n_power_iterations < 1.
        IndexError: dim is no dimension of the parameter.

    Example:
        >>> linear = fastnorm.parametrizations.spectral_norm(torch.nn.Linear(20, 40), n_power_iterations=20)
        >>> bool(abs(torch.linalg.matrix_norm(linear.weight, 2) - 1) < 0.05)
        True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no parameter or buffer named {name!r}")
    if dim is None:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dim = 1 if isinstance(module, transposed) else 0
    parametrize.register_parametrization(module, name, _SpectralNorm(weight, n_power_iterations, dim, eps))
    return module
