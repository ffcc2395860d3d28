"""Forward-mode AD and torch.func: every op through its kernel, for conftest.py lets no fallback pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import reference
import torch
from cases import CASES, Case
from networks import readme_code
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import fastnorm
import fastnorm.functional as fn
from fastnorm.parametrizations import spectral_norm, weight_norm

# The parametrizations have tests of layers, see below; dropout is linear and has tests of its own; what SyncBatchNorm
# does among several processes is for ordinary backward alone.
OTHERS = ("weight_norm", "spectral_norm", "sync_batch_norm")
DIFFERENTIABLE = [c for c in CASES if "drop" not in c.name and not c.name.startswith(OTHERS)]
# one of each op and way to normalise, with nothing and with everything fused
FEW = [c for c in DIFFERENTIABLE if not c.name.endswith(("relu", "silu")) and "size1000" not in c.name]
# running statistics that all elements of a batch share would have to be updated by each
MAPPED = [c for c in DIFFERENTIABLE if not c.name.startswith("instance_norm-input")]


def tensors_and_tangents(case: Case, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], ...]:
    tensors = case.inputs(case.small, dtype)
    case.fastnorm(*tensors)  # makes the statistics that cases.py caches: not inside of a transform
    generator = torch.Generator().manual_seed(1)
    return tuple(tensors), tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors)


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-9) -> None:
    """Relative to the largest element: derivatives are sums that cancel."""
    assert got.shape == wanted.shape
    allowed = rtol * max(1.0, wanted.abs().max().item())
    assert (got - wanted).abs().max().item() <= allowed, ((got - wanted).abs().max(), allowed)


# ---- forward mode


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_forward_mode(case: Case) -> None:
    """Both of torch's: dual tensors, and torch.func.jvp. All arguments move, then each alone."""
    x, dx = tensors_and_tangents(case)
    y = case.reference(*x)
    close(case.fastnorm(*x), y)
    pairs = list(zip(x, dx, strict=True))
    for alone in (None, *range(len(x))):
        tangents = tuple(d if alone in (None, i) else torch.zeros_like(d) for i, d in enumerate(dx))
        wanted = jvp(case.reference, x, tangents)[1]
        close(jvp(case.fastnorm, x, tangents)[1], wanted)
        with forward_ad.dual_level():
            mixed = [forward_ad.make_dual(t, d) if alone in (None, i) else t for i, (t, d) in enumerate(pairs)]
            tangent = forward_ad.unpack_dual(case.fastnorm(*mixed)).tangent
        close(tangent, wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_forward_mode_of_other_types(case: Case, dtype: torch.dtype) -> None:
    x, dx = tensors_and_tangents(case, dtype)
    y, tangent = jvp(case.fastnorm, x, dx)
    assert y.dtype == tangent.dtype == dtype
    wanted_y, wanted = jvp(case.reference, tuple(t.double() for t in x), tuple(t.double() for t in dx))
    # one rounding of xhat, one of each of the four steps after it, in sums of no more than 24 terms
    close(y.double(), wanted_y, 16 * torch.finfo(dtype).eps)
    close(tangent.double(), wanted, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_backward_through_the_tangent(case: Case) -> None:
    """Reverse over forward, with dual tensors."""
    x, dx = tensors_and_tangents(case)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in x]
        with forward_ad.dual_level():
            y = function(*map(forward_ad.make_dual, leaves, dx))
            tangent = forward_ad.unpack_dual(y).tangent
        return list(torch.autograd.grad(tangent.pow(2).sum(), leaves, allow_unused=True, materialize_grads=True))

    for got, wanted in zip(gradients(case.fastnorm), gradients(case.reference), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_backward_through_the_tangent_alone(case: Case) -> None:
    """Where only x moves and the output is not used, autograd hands over tensors of zeros that have no memory."""
    x, dx = tensors_and_tangents(case)

    def loss(function: Callable[..., Tensor], x0: Tensor) -> Tensor:
        return jvp(lambda t: function(t, *x[1:]), (x0,), (dx[0],))[1].square().sum()

    wanted = grad(lambda t: loss(case.reference, t))(x[0])
    close(grad(lambda t: loss(case.fastnorm, t))(x[0]), wanted)
    leaf = x[0].clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(case.fastnorm(forward_ad.make_dual(leaf, dx[0]), *x[1:])).tangent
        close(torch.autograd.grad(tangent.square().sum(), leaf)[0], wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zeros_without_memory(case: Case) -> None:
    """torch's ZeroTensor, as a gradient and as a residual's or parameter's value."""
    tensors = [t.requires_grad_() for t in case.inputs(case.small, torch.float64)]
    y = case.fastnorm(*tensors)
    y.backward(torch._efficientzerotensor(y.shape, dtype=y.dtype))
    for t in tensors:
        assert t.grad is not None and not t.grad.any()
    if "norm" in case.name and not case.name.startswith(OTHERS):
        zeros = [torch._efficientzerotensor(t.shape, dtype=t.dtype) for t in tensors[1:]]
        wanted = case.fastnorm(tensors[0].detach(), *(torch.zeros_like(t) for t in tensors[1:]))
        assert torch.equal(case.fastnorm(tensors[0].detach(), *zeros), wanted)


def test_a_tangent_of_the_gradient() -> None:
    """Of a forward without dual tensors, the backward with them: never dropped unseen."""
    x, dy, tangent = torch.randn(3, 2, 6, 4, 5, dtype=torch.float64).unbind(0)
    x.requires_grad_()

    def backward(y: Tensor) -> Tensor:
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent), retain_graph=True)
            return forward_ad.unpack_dual(dx).tangent

    norms = fn.layer_norm(x, (5,)), fn.batch_norm(x, None, None, training=True), fn.group_norm(x, 3, activation="gelu")
    for y in (*norms, fn.dropout(x), fn.alpha_dropout(x, 0.5, True), fn.local_response_norm(x, 3)):
        close(backward(y), torch.autograd.grad(y, x, tangent, retain_graph=True)[0])  # linear in dy


# ---- reverse mode of torch.func


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_grad(case: Case) -> None:
    x, _ = tensors_and_tangents(case)
    every = tuple(range(len(x)))
    got = grad(lambda *a: case.fastnorm(*a).pow(3).sum(), argnums=every)(*x)
    wanted = grad(lambda *a: case.reference(*a).pow(3).sum(), argnums=every)(*x)
    for g, w in zip(got, wanted, strict=True):
        close(g, w)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("outer", (jacfwd, jacrev))
def test_second_derivatives(case: Case, outer: Callable[..., Callable[..., Tensor]]) -> None:
    x, _ = tensors_and_tangents(case)
    for inner in (jacfwd, jacrev):
        run = outer(inner(lambda a: case.fastnorm(a, *x[1:]).pow(3).sum()))
        if inner is outer is jacfwd and case.op == "local_response_norm":  # has no kernel for its jvp
            with pytest.raises(NotImplementedError, match="local_response_norm: no kernel for forward mode inside"):
                run(x[0])
            fastnorm.set_fallback("silent")
        got = run(x[0])
        fastnorm.set_fallback("error")
        close(got, hessian(lambda a: case.reference(a, *x[1:]).pow(3).sum())(x[0]))


def test_third_derivative_by_forward_mode_alone() -> None:
    """Torch sees no outer forward mode in a jvp rule of its own ops: there the kernels give way."""
    x = torch.randn(3, 4, dtype=torch.float64)

    def third(norm: Callable[..., Tensor]) -> Tensor:
        function = lambda t: norm(t, (4,)).pow(3).sum()  # noqa: E731
        for _ in range(3):
            function = jacfwd(function)
        return function(x[:1])

    with pytest.raises(NotImplementedError, match="layer_norm: no kernel for forward mode inside of forward mode"):
        third(fn.layer_norm)
    fastnorm.set_fallback("silent")
    close(third(fn.layer_norm), third(nn.functional.layer_norm), 1e-8)


# ---- vmap


@pytest.mark.parametrize("case", MAPPED, ids=str)
def test_vmap_is_a_loop(case: Case) -> None:
    """Over the input alone, over everything, along other dimensions; float32, so that it is the kernel's rounding."""
    x, _ = tensors_and_tangents(case, torch.float32)
    stacks = [torch.stack([t, 1.5 * t + 0.1, t - 0.3]) for t in x]
    alone = torch.stack([case.fastnorm(t, *x[1:]) for t in stacks[0]])
    together = torch.stack([case.fastnorm(*ts) for ts in zip(*stacks, strict=True)])
    ones = (None,) * (len(x) - 1)
    close(vmap(case.fastnorm, (0, *ones))(stacks[0], *x[1:]), alone, 1e-6)
    close(vmap(case.fastnorm)(*stacks), together, 1e-6)
    last = [t.movedim(0, -1) for t in stacks]
    close(vmap(case.fastnorm, -1, 1)(*last), together.movedim(0, 1), 1e-6)
    if len(x) > 1:
        only_parameters = torch.stack([case.fastnorm(x[0], *ts) for ts in zip(*stacks[1:], strict=True)])
        close(vmap(case.fastnorm, (None, *(0,) * len(ones)))(x[0], *stacks[1:]), only_parameters, 1e-6)
    twice = torch.stack([stacks[0], stacks[0] + 1], dim=2)
    wanted = torch.stack([torch.stack([case.fastnorm(t, *x[1:]) for t in row.unbind(1)]) for row in twice])
    close(vmap(vmap(lambda t: case.fastnorm(t, *x[1:]), 1))(twice), wanted, 1e-6)


@pytest.mark.parametrize("case", [c for c in MAPPED if c in FEW], ids=str)
def test_gradients_of_each_sample(case: Case) -> None:
    x, _ = tensors_and_tangents(case)
    stack = torch.stack([x[0], 1.5 * x[0] + 0.1])
    every = tuple(range(len(x)))
    one = grad(lambda *a: case.fastnorm(*a).pow(3).sum(), argnums=every)
    got = vmap(one, (0, *(None,) * (len(x) - 1)))(stack, *x[1:])
    for i, t in enumerate(stack):
        for g, w in zip(got, one(t, *x[1:]), strict=True):
            close(g[i], w)


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            fastnorm.BatchNorm2d(4, activation="relu"),
            fastnorm.InstanceNorm2d(4, affine=True, track_running_stats=True),
            fastnorm.BatchRenorm2d(4, momentum=None),
        )
        for _ in range(count)
    ]


def test_an_ensemble_has_its_own_running_statistics() -> None:
    models, x = networks(3), torch.randn(5, 3, 8, 8)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    for training in (True, False):
        base.train(training)
        wanted = torch.stack([model.train(training)(x) for model in models])
        got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
        close(got, wanted, 1e-5)
        for name, stacked in buffers.items():
            close(stacked.double(), torch.stack([dict(m.named_buffers())[name] for m in models]).double(), 1e-6)


@pytest.mark.parametrize("module", (fastnorm.BatchNorm1d(3), fastnorm.InstanceNorm1d(3, track_running_stats=True)))
def test_shared_running_statistics(module: nn.Module) -> None:
    """torch.func.grad updates them once, vmap cannot, evaluation reads them."""
    x = torch.randn(4, 3, 5)
    twin = copy.deepcopy(module)
    grad(lambda x: module(x).square().sum())(x)
    twin(x)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    assert module.running_mean.count_nonzero()
    with pytest.raises(RuntimeError, match="all elements of vmap's batch share cannot be updated"):
        vmap(module)(torch.stack([x, x]))
    close(vmap(module.eval())(torch.stack([x, x + 1])), torch.stack([module(x), module(x + 1)]), 1e-6)


def test_skip_nonfinite_stats_inside_of_grad() -> None:
    norm = fastnorm.BatchNorm1d(3, skip_nonfinite_stats=True)
    grad(lambda x: norm(x).sum())(torch.full((4, 3), float("inf")))
    assert norm.running_mean.isfinite().all() and norm.num_batches_tracked == 0


# ---- dropout

DROPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    name: lambda x, seed, name=name: getattr(fn, name)(x, 0.4, True, generator=torch.Generator().manual_seed(seed))
    for name in ("dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout", "drop_path")
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_has_the_mask_of_an_eager_call(name: str) -> None:
    x, dx = torch.randn(2, 6, 5, 7, 3, dtype=torch.float64).unbind(0)
    y, slope = DROPS[name](x, 1), DROPS[name](x + 1, 1) - DROPS[name](x, 1)  # y is affine in x
    got, tangent = jvp(lambda t: DROPS[name](t, 1), (x,), (dx,))
    assert torch.equal(got, y)
    close(tangent, slope * dx)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(DROPS[name](forward_ad.make_dual(x, dx), 1))
    assert torch.equal(dual.primal, y) and torch.equal(dual.tangent, tangent)
    close(grad(lambda t: (DROPS[name](t, 1) * dx).sum())(x), slope * dx)
    jacobian = jacrev(lambda t: DROPS[name](t, 1).flatten())(x[:1, :2]).flatten(1)
    close(jacobian, torch.diag(DROPS[name](x[:1, :2] + 1, 1).sub(DROPS[name](x[:1, :2], 1)).flatten()))


@pytest.mark.parametrize("name", DROPS)
def test_randomness_of_vmap(name: str) -> None:
    """One mask for all or one for each, as it says; and backward has the mask of forward."""
    x = torch.full((8, 5, 40, 3, 2), 2.0, dtype=torch.float64)

    def drop(t: Tensor) -> Tensor:
        return getattr(fn, name)(t, 0.5, True)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(x)
    same, different = (vmap(drop, randomness=r)(x) for r in ("same", "different"))
    assert all(torch.equal(y, same[0]) for y in same)
    assert len({tuple(y.flatten().tolist()) for y in different}) > 1
    unbatched = vmap(lambda t, u: drop(u), (0, None), randomness="different")(x, x[0])
    assert len({tuple(y.flatten().tolist()) for y in unbatched}) > 1
    for randomness in ("same", "different"):
        gradient, y = vmap(torch.func.grad_and_value(lambda t: drop(t).sum()), randomness=randomness)(x)
        if "alpha" not in name:  # linear: the sum of y is the sum of x times its gradient
            close((gradient * x).sum((1, 2, 3, 4)), y)


def test_inplace() -> None:
    x = torch.randn(4, 6)

    def run(t: Tensor) -> Tensor:
        t = t * 1
        y = fn.dropout(t, 0.5, inplace=True)
        assert y is t
        return y

    torch.manual_seed(0)
    _, tangent = jvp(run, (x,), (torch.ones_like(x),))
    assert set(tangent.flatten().tolist()) == {0.0, 2.0}


# ---- the parametrizations


def _reference_layer(name: str, layer: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    u, v = (b.clone() for b in layer.parametrizations.weight[0].buffers()) if name == "spectral_norm" else (None, None)

    def run(p: dict[str, Tensor]) -> Tensor:
        if name == "weight_norm":
            g, v_ = (p[f"parametrizations.weight.original{i}"] for i in (0, 1))
            return nn.functional.linear(x, reference.weight_norm(v_, g, 0), p["bias"])
        weight = reference.spectral_norm(p["parametrizations.weight.original"], u, v, 0)
        return nn.functional.linear(x, weight, p["bias"])

    return run


PARAMETRIZATIONS = {"weight_norm": weight_norm, "spectral_norm": spectral_norm}
every_parametrization = pytest.mark.parametrize("name", PARAMETRIZATIONS)


def _layer(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    layer = PARAMETRIZATIONS[name](nn.Linear(4, 3, dtype=torch.float64))
    return layer, {k: p.detach() for k, p in layer.named_parameters()}


@every_parametrization
def test_derivatives_of_a_parametrization(name: str) -> None:
    layer, parameters = _layer(name)
    layer.eval()
    x = torch.randn(2, 4, dtype=torch.float64)

    def run(p: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, p, (x,)).pow(3)

    wanted_run = _reference_layer(name, layer, x)
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}
    for got, wanted in zip(
        jvp(run, (parameters,), (tangents,)),
        jvp(lambda p: wanted_run(p).pow(3), (parameters,), (tangents,)),
        strict=True,
    ):
        close(got, wanted)
    for derivative in (grad, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        got = derivative(lambda p: run(p).sum())(parameters)
        wanted = derivative(lambda p: wanted_run(p).pow(3).sum())(parameters)
        for g, w in zip(*map(torch.utils._pytree.tree_leaves, (got, wanted)), strict=True):
            close(g, w)
    xs = torch.randn(5, 2, 4, dtype=torch.float64)
    close(vmap(layer)(xs), torch.stack([layer(x) for x in xs]))


@pytest.mark.parametrize("dim", (1, None))
def test_weight_norm_of_low_precision_in_a_transform(dim: int | None) -> None:
    layer = weight_norm(nn.Linear(40, 30, dtype=torch.bfloat16), dim=dim)
    y, tangent = jvp(lambda x: layer.weight * x, (torch.ones(()).bfloat16(),), (torch.ones(()).bfloat16(),))
    assert y.dtype == torch.bfloat16
    close(tangent, layer.weight, torch.finfo(torch.bfloat16).eps)


def test_the_power_method_inside_of_transforms() -> None:
    """In training u and v take the step that an eager call has them take, and are constants to derivatives."""
    (layer, parameters), (twin, _) = _layer("spectral_norm"), _layer("spectral_norm")
    x = torch.randn(2, 4, dtype=torch.float64)
    got = grad(lambda p: functional_call(layer, p, (x,)).pow(3).sum())(parameters)
    twin(x).pow(3).sum().backward()
    for key, p in twin.named_parameters():
        close(got[key], p.grad)
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(layer, p, (x,)), (parameters,), (tangents,))
    _ = twin(x)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    close(tangent, jvp(_reference_layer("spectral_norm", layer, x), (parameters,), (tangents,))[1])


@every_parametrization
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_an_ensemble_of_parametrized_layers(name: str, training: bool) -> None:
    layers = [_layer(name, seed)[0].train(training) for seed in range(3)]
    base, x = copy.deepcopy(layers[0]), torch.randn(2, 4, dtype=torch.float64)
    parameters, buffers = (
        {k: torch.stack([dict(f(m))[k].detach() for m in layers]) for k, _ in f(base)}
        for f in (nn.Module.named_parameters, nn.Module.named_buffers)
    )

    def run(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (p, b), (x,))

    got, wanted = vmap(run)(parameters, buffers), torch.stack([layer(x) for layer in layers])
    close(got, wanted)
    for key, stacked in buffers.items():
        assert torch.equal(stacked, torch.stack([dict(layer.named_buffers())[key] for layer in layers]))
    if training and name == "spectral_norm":
        with pytest.raises(RuntimeError, match="spectral_norm: u and v that all elements of vmap's batch share"):
            vmap(lambda p: functional_call(base, p, (x,)))(parameters)


# ---- a batch of gradients by ordinary backward


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("sync_batch_norm")], ids=str)
def test_is_grads_batched(case: Case) -> None:
    x, _ = tensors_and_tangents(case)
    leaves = [t.clone().requires_grad_() for t in x]
    y = case.fastnorm(*leaves)
    batch = torch.randn(3, *y.shape, dtype=torch.float64)
    for create_graph in (False, True):
        options = {"retain_graph": True, "create_graph": create_graph}
        got = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, **options)
        wanted = [
            torch.stack(g) for g in zip(*(torch.autograd.grad(y, leaves, dy, **options) for dy in batch), strict=True)
        ]
        for g, w in zip(got, wanted, strict=True):
            close(g, w)
    if any(g.requires_grad for g in got):
        again, wanted_again = (
            torch.autograd.grad(sum(g.pow(3).sum() for g in gs), leaves[0], allow_unused=True) for gs in (got, wanted)
        )
        if wanted_again[0] is not None:
            close(again[0], wanted_again[0])


@pytest.mark.parametrize("case", [c for c in CASES if c in FEW or c.name.startswith(OTHERS[:2])], ids=str)
def test_vmap_of_ordinary_backward(case: Case) -> None:
    x, _ = tensors_and_tangents(case)
    leaves = [t.clone().requires_grad_() for t in x]
    y = case.fastnorm(*leaves)
    batch = torch.randn(3, *y.shape, dtype=torch.float64)
    got = vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(batch)
    wanted = zip(*(torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in batch), strict=True)
    for g, w in zip(got, wanted, strict=True):
        close(g, torch.stack(w))


@pytest.mark.parametrize("case", [*FEW, *(c for c in CASES if c.name in ("dropout-0.5", "alpha_dropout-0.5"))], ids=str)
def test_vectorized_jacobian(case: Case) -> None:
    x, _ = tensors_and_tangents(case)
    wanted = torch.autograd.functional.jacobian(case.reference, x)
    for strategy in ("reverse-mode", "forward-mode"):
        got = torch.autograd.functional.jacobian(case.fastnorm, x, vectorize=True, strategy=strategy)
        for g, w in zip(got, wanted, strict=True):
            close(g, w)


def test_a_tangent_of_the_gradient_of_parametrizations() -> None:
    """As above, by the nodes that are not norms."""
    for name in PARAMETRIZATIONS:
        layer, _ = _layer(name)
        weight = layer.eval().weight
        leaf = next(p for key, p in layer.named_parameters() if key.endswith(("original", "original1")))
        dy, tangent = torch.randn(2, *weight.shape, dtype=torch.float64).unbind(0)
        with forward_ad.dual_level():
            (d,) = torch.autograd.grad(weight, leaf, forward_ad.make_dual(dy, tangent), retain_graph=True)
            got = forward_ad.unpack_dual(d).tangent
        close(got, torch.autograd.grad(weight, leaf, tangent)[0])  # linear in dy


# ---- what has no kernel there


def test_complex_numbers_go_to_torch() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match="dropout: no kernel for input of type ComplexFloat"):
        vmap(lambda t: fn.dropout(t), randomness="same")(x)


def test_a_wrong_parameter() -> None:
    x = torch.randn(4, 3, 5)
    for run in (
        lambda x: fn.batch_norm(x, None, None, torch.ones(1), None, True),
        lambda x: fn.group_norm(x, 1, None, torch.ones(5)),
        lambda x: fn.layer_norm(x, (5,), torch.ones(1)),
    ):
        with pytest.raises(RuntimeError, match=r"(weight|bias) must have shape \[[35]\]"):
            run(x)
        with pytest.raises(RuntimeError, match=r"(weight|bias) must have shape \[[35]\]"):
            vmap(run)(torch.stack([x, x]))


def test_reference_is_another_function() -> None:
    """The comparisons above fail for a slightly different op."""
    case = next(c for c in CASES if c.name == "batch_norm-train")
    x, dx = tensors_and_tangents(case)
    wrong = jvp(lambda t, w, b: reference.batch_norm(t, w, b, eps=2e-5), x, dx)[1]
    with pytest.raises(AssertionError):
        close(jvp(case.fastnorm, x, dx)[1], wrong)


def test_readme():
    exec(readme_code("Derivatives, torch.func and autocast"), names := {})
    assert names["x"].grad.abs().sum() > 0 and names["tangent"] is not None
    assert names["per_sample"].shape == (8, 16) and names["loss"].isfinite()
