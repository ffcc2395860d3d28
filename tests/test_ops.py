"""Properties that every op has, over the table of cases.py."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DEVICES, SLACK, Case
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_twice_differentiable_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.differentiable_twice], ids=str
)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])


def channels_last(t: Tensor) -> Tensor:
    """The same values, the channels innermost in memory, for any number of dimensions from 3 on."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def differentiate(function, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of sum(dy * y) with respect to every tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), list(torch.autograd.grad(y, leaves, dy))


def cotangent(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(x.numel())
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest magnitude wanted; infinite if NaNs are not where they should be."""
    got = got.double().cpu()
    if not torch.equal(got.isnan(), wanted.isnan()):
        return float("inf")
    scale = wanted.nan_to_num().abs().max().item() if wanted.numel() else 0.0
    return (got - wanted).nan_to_num().abs().max().item() / max(scale, 1e-30) if wanted.numel() else 0.0


def assert_as_accurate(name: str, units: int, got: Tensor, torch_got: Tensor, wanted: Tensor) -> None:
    """No further from float64 than torch, or than what rounding the exact result to this type could give.

    In float64 the reference itself has the rounding errors of sums of some thousand terms.
    """
    units = 512 if got.dtype == torch.float64 else units
    allowed = SLACK * max(error(torch_got, wanted), units * torch.finfo(got.dtype).eps)
    assert got.dtype == torch_got.dtype and got.shape == torch_got.shape, name
    assert error(got, wanted) <= allowed, f"{name}: error {error(got, wanted):.3g}, allowed {allowed:.3g}"


def compare(case: Case, tensors: list[Tensor], layout=lambda t: t) -> None:
    dy = cotangent(tensors[0])
    laid = [layout(t) if t.dim() == tensors[0].dim() else t for t in tensors]
    y, grads = differentiate(case.fastnorm, laid, layout(dy))
    torch_y, torch_grads = differentiate(case.torch, tensors, dy)
    exact = [t.double().cpu() for t in (*tensors, dy)]
    wanted_y, wanted_grads = differentiate(case.reference, exact[:-1], exact[-1])
    assert_as_accurate("y", case.units, y, torch_y, wanted_y)
    for i, (g, torch_g, wanted) in enumerate(zip(grads, torch_grads, wanted_grads, strict=True)):
        assert_as_accurate(f"gradient of argument {i}", case.units, g, torch_g, wanted)


@every_dtype
@every_case
@every_device
def test_against_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    for shape in case.shapes:
        compare(case, case.inputs(shape, dtype, device))


@every_dtype
@every_case
@every_device
def test_against_float64_channels_last(case: Case, dtype: torch.dtype, device: str) -> None:
    for shape in case.shapes:
        compare(case, case.inputs(shape, dtype, device), channels_last)


@pytest.mark.parametrize("mean", (1e3, 1e5))
@every_case
@every_device
def test_mean_far_above_std(case: Case, mean: float, device: str) -> None:
    if not case.subtracts_mean:
        pytest.skip("nothing is subtracted")
    for shape in case.shapes[:4]:
        compare(case, case.inputs(shape, torch.float32, device, mean=mean, std=1.0))
        compare(case, case.inputs(shape, torch.float32, device, mean=mean, std=1.0), channels_last)


@every_case
@every_device
def test_output_has_the_layout_of_the_input(case: Case, device: str) -> None:
    for shape in case.shapes:
        tensors = case.inputs(shape, torch.float32, device)
        for layout in (lambda t: t, channels_last):
            x = layout(tensors[0])
            y = case.fastnorm(x, *tensors[1:])
            assert y.stride() == x.stride() if case.keeps_layout else y.is_contiguous()


@pytest.mark.parametrize("dim", (0, 1, 2))
@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith(("weight", "spectral"))], ids=str)
@every_device
def test_a_part_of_a_channels_last_tensor(case: Case, dim: int, device: str) -> None:
    """Half of the samples or channels, a crop: what comes next is to find channels_last, as after torch's layers."""
    for shape in case.shapes[1:4]:
        if len(shape) != 4:
            continue
        tensors = case.inputs(shape, torch.float32, device)
        whole = channels_last(tensors[0])
        part = channels_last(torch.cat([whole, whole], dim)).narrow(dim, 0, shape[dim])
        y, wanted = case.fastnorm(part, *tensors[1:]), case.fastnorm(whole, *tensors[1:])
        assert torch.equal(y, wanted)
        assert y.stride() == wanted.stride()


def contiguous_hooks() -> torch.autograd.graph.saved_tensors_hooks:
    """As save_on_cpu(pin_memory=True): what was kept comes back contiguous."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous())


@every_case
@every_device
def test_hooks_that_change_the_layout(case: Case, device: str) -> None:
    for shape in ((3, 8, 6, 6), (3, 8, 8, 8)):
        tensors = [channels_last(t) for t in case.inputs(shape, torch.float32, device)]
        dy = cotangent(tensors[0])
        _, grads = differentiate(case.fastnorm, tensors, dy)
        with contiguous_hooks():
            _, others = differentiate(case.fastnorm, tensors, dy)
        for a, b in zip(others, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_case
@every_device
def test_negated_by_a_mark(case: Case, device: str) -> None:
    """A gradient and all arguments but the first that torch has not negated yet."""
    first, *others = case.inputs(case.shapes[1], torch.float32, device)
    dy = cotangent(first)
    _, grads = differentiate(case.fastnorm, [first, *(-t for t in others)], -dy)
    _, marked = differentiate(case.fastnorm, [first, *map(torch._neg_view, others)], torch._neg_view(dy))
    for a, b in zip(marked, grads, strict=True):
        assert torch.equal(a, b)


STRIDES = {
    "every other column": lambda t: torch.stack([t, t], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "last two swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced batch": lambda t: torch.stack([t, t], dim=1)[:, 0],
}


@pytest.mark.parametrize("name", STRIDES)
@every_case
@every_device
def test_other_strides(case: Case, name: str, device: str) -> None:
    for shape in case.shapes[:4]:
        tensors = case.inputs(shape, torch.float32, device)
        dy = cotangent(tensors[0])
        y, grads = differentiate(case.fastnorm, tensors, dy)
        strided = [STRIDES[name](t) if t.shape == tensors[0].shape else t for t in tensors]
        other_y, other_grads = differentiate(case.fastnorm, strided, STRIDES[name](dy))
        # a GPU takes unaligned tensors an element at a time, and so adds in another order
        rounds_anew = device == "cuda" and name == "offset"
        for a, b in zip((other_y, *other_grads), (y, *grads), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) if rounds_anew else torch.equal(a, b)


@every_case
@every_device
def test_expanded_gradient(case: Case, device: str) -> None:
    """What y.sum().backward() sends: a gradient of one element and zero strides."""
    tensors = case.inputs(case.shapes[1], torch.float32, device)
    _, grads = differentiate(case.fastnorm, tensors, torch.ones_like(tensors[0]))
    _, expanded = differentiate(case.fastnorm, tensors, torch.ones((), device=device).expand(tensors[0].shape))
    for a, b in zip(grads, expanded, strict=True):
        assert torch.equal(a, b)


BIG_SHAPES = ((4, 3, 90, 90), (8, 32, 40, 41), (33, 40, 9, 3))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@every_case
@every_device
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype, device: str) -> None:
    """And at every run: on a CUDA device there are no threads to vary."""
    for shape in BIG_SHAPES:
        for layout in (lambda t: t, channels_last):
            tensors = [layout(t) for t in case.inputs(shape, dtype, device)]
            dy = layout(cotangent(tensors[0]))
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y, grads = differentiate(case.fastnorm, tensors, dy)
                results.append([y, *grads])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert torch.equal(a, b)


@every_case
@every_device
def test_inputs_and_gradient_are_not_written(case: Case, device: str) -> None:
    tensors = case.inputs(case.shapes[2], torch.float32, device)
    dy = cotangent(tensors[0])
    before = [t.clone() for t in (*tensors, dy)]
    differentiate(case.fastnorm, tensors, dy)
    for t, old in zip((*tensors, dy), before, strict=True):
        assert torch.equal(t, old)


@every_dtype
@every_case
@every_device
def test_gradient_that_nobody_else_holds(case: Case, dtype: torch.dtype, device: str) -> None:
    """Backward may write dx over it; every bit is what it is of one that the caller holds."""
    for shape in case.shapes[2:6]:
        for layout in (torch.clone, channels_last):
            tensors = [layout(t) for t in case.inputs(shape, dtype, device)]
            dy = layout(cotangent(tensors[0]))
            _, held = differentiate(case.fastnorm, tensors, dy)
            _, alone = differentiate(lambda *leaves: case.fastnorm(*leaves) * 1, tensors, dy)
            for a, b in zip(held, alone, strict=True):
                assert torch.equal(a, b)


@every_case
@every_device
def test_empty(case: Case, device: str) -> None:
    for shape in case.empty:
        tensors = case.inputs(shape, torch.float32, device)
        y, grads = differentiate(case.fastnorm, tensors, torch.zeros(shape, device=device))
        assert y.shape == tensors[0].shape
        for g, t in zip(grads, tensors, strict=True):
            assert g.shape == t.shape and not g.any()


@every_case
@every_device
def test_only_wanted_gradients(case: Case, device: str) -> None:
    """Each tensor alone requiring grad: the same gradient as when all do, and a grad_fn only where one is due."""
    tensors = case.inputs(case.shapes[2], torch.float32, device)
    dy = cotangent(tensors[0])
    _, all_grads = differentiate(case.fastnorm, tensors, dy)
    for i, wanted in enumerate(all_grads):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        y = case.fastnorm(*leaves)
        (g,) = torch.autograd.grad(y, [leaves[i]], dy)
        assert torch.equal(g, wanted)
    assert not case.fastnorm(*tensors).requires_grad
    with torch.no_grad():
        assert not case.fastnorm(*[t.detach().requires_grad_() for t in tensors]).requires_grad


@every_case
@every_device
def test_gradcheck(case: Case, device: str) -> None:
    """On a CUDA device, where thousands of tiny calls take seconds, along one random direction."""
    for layout in (lambda t: t, channels_last):
        tensors = [layout(t).requires_grad_() for t in case.inputs(case.small, torch.float64, device)]
        assert torch.autograd.gradcheck(case.fastnorm, tensors, check_undefined_grad=True, fast_mode=device != "cpu")


@every_twice_differentiable_case
@every_device
def test_gradgradcheck(case: Case, device: str) -> None:
    tensors = [t.requires_grad_() for t in case.inputs(case.small, torch.float64, device)]
    assert torch.autograd.gradgradcheck(case.fastnorm, tensors, fast_mode=device != "cpu")


@every_twice_differentiable_case
@every_device
def test_third_derivative(case: Case, device: str) -> None:
    """create_graph twice: against the same derivative of the float64 reference."""

    def third(function, device: str) -> Tensor:
        x, *rest = (t.requires_grad_() for t in case.inputs(case.small, torch.float64, device))
        value = function(x, *rest)
        for power in (3, 2):
            (value,) = torch.autograd.grad((value**power).sum(), x, create_graph=True)
        (value,) = torch.autograd.grad((value**2).sum(), x)
        return value

    got, wanted = third(case.fastnorm, device).cpu(), third(case.reference, "cpu")
    # derivatives of third order of a function with 1/std in it: rounding grows by the condition of each step
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@every_case
@every_device
def test_kept_for_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    """The input if it is needed, the parameters, and no more than the case allows."""
    tensors = [t.requires_grad_() for t in case.inputs((4, 32, 16, 18), dtype, device)]
    allowed = {t.data_ptr() for i, t in enumerate(tensors[1:]) if case.saves is None or i in case.saves}
    if case.saves_input:
        allowed.add(tensors[0].data_ptr())
    extra: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in allowed:
            extra[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.fastnorm(*tensors)
    assert sum(extra.values()) <= case.kept(tensors[0])


@pytest.mark.parametrize("case", [case for case in CASES if case.saves is not None], ids=str)
@every_device
def test_what_is_not_kept_may_change_before_backward(case: Case, device: str) -> None:
    """As the bias of torch.nn's layers may, between the forward and the backward passes of a pipeline."""
    tensors = case.inputs(case.small, torch.float64, device)
    results = []
    for change in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = case.fastnorm(*leaves)
        with torch.no_grad():
            for i, t in enumerate(leaves[1:]):
                if change and i not in case.saves:
                    t.add_(1)
        dy = cotangent(tensors[0]).requires_grad_()
        found = torch.autograd.grad(y, leaves, dy, create_graph=case.differentiable_twice)
        if case.differentiable_twice:
            value = sum(g.square().sum() for g in found)
            second = torch.autograd.grad(value, [dy, *leaves], allow_unused=True, materialize_grads=True)
            found = *found, *second
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
