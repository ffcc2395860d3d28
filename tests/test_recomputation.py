"""fastnorm.recompute: less is kept for backward, and every number stays as it is."""

import contextlib
import gc
import weakref
from collections import Counter

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.recomputation import Output, held


def gradients(model, x, **options):
    """The loss's gradients, forward in the context if it is given a depth."""
    model.zero_grad()
    if options:
        with fastnorm.recompute(**options):
            y = model(x)
    else:
        y = model(x)
    y.square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def kept(model, x, depth=None):
    """Bytes that a forward pass keeps for backward, parameters left out, and how many outputs are computed again."""
    storages, outputs = {}, 0

    def add(t):
        storages[t.untyped_storage().data_ptr()] = t  # held, so that no other gets its address

    if depth:
        context = fastnorm.recompute(depth)
        packed = context.pack_hook

        def pack(t):
            nonlocal outputs
            result = packed(t)
            outputs += isinstance(result, Output)
            if (own := held(result)) is not None:
                add(own)
            return result

        context.pack_hook = pack
    else:
        context = torch.autograd.graph.saved_tensors_hooks(lambda t: add(t) or t, lambda t: t)
    with context:
        y = model(x)
    del y
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in storages.values()), outputs


class Residual(nn.Module):
    """Blocks conv, norm + relu, conv, norm + add + relu: each needs the one before it."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2 * blocks))
        self.norms = nn.ModuleList(fastnorm.BatchNorm2d(8, activation="relu") for _ in range(2 * blocks + 1))

    def forward(self, x):
        x = self.norms[-1](self.stem(x))
        for i in range(0, len(self.convolutions), 2):
            y = self.norms[i](self.convolutions[i](x))
            x = self.norms[i + 1](self.convolutions[i + 1](y), residual=x)
        return x.mean((2, 3))


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group", "instance"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_same_bit_for_bit(norm, activation, training):
    layers = {
        "batch": lambda: fastnorm.BatchNorm2d(8, activation=activation),
        "layer": lambda: fastnorm.LayerNorm([8, 6, 6], activation=activation),
        "rms": lambda: fastnorm.RMSNorm([8, 6, 6], activation=activation),
        "group": lambda: fastnorm.GroupNorm(2, 8, activation=activation),
        "instance": lambda: fastnorm.InstanceNorm2d(8, affine=True, track_running_stats=True, activation=activation),
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers[norm](), nn.Conv2d(8, 4, 3))
    model.train(training)
    x = torch.randn(2, 3, 8, 8)
    buffers = [b.clone() for b in model.buffers()]
    expected = gradients(model, x)
    after_one = [b.clone() for b in model.buffers()]
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    got = gradients(model, x, depth=1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), after_one, strict=True))  # updated once


@pytest.mark.parametrize("depth, expected_outputs", [(1, 8), (2, 9), (9, 10)])
def test_residual_blocks(depth, expected_outputs):
    """Of the ten inputs of convolutions, five come from norms with a chain of residuals."""
    torch.manual_seed(0)
    model, x = Residual(5), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)
    got = gradients(model, x, depth=depth)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert kept(model, x, depth)[1] == expected_outputs


def test_a_resnet_keeps_at_most_70_percent_of_torch():
    torch.manual_seed(0)
    model = networks.ResNet()
    x = torch.randn(4, 3, 32, 32)
    before, _ = kept(model, x)
    model = fastnorm.fuse(fastnorm.convert(model))
    after, _ = kept(model, x, depth=2)
    assert after <= 0.7 * before, f"{after / before:.2f}"


def test_each_output_is_computed_again_only_when_backward_needs_it(monkeypatch):
    calls = Counter()
    again = fastnorm.autograd.BatchNormFunction.again
    monkeypatch.setattr(
        fastnorm.autograd.BatchNormFunction, "again", lambda *args: (calls.update(again=1), again(*args))[1]
    )
    model, x = Residual(1), torch.randn(2, 3, 8, 8)
    with fastnorm.recompute():
        y = model(x)
    assert calls["again"] == 0
    y.sum().backward()
    assert calls["again"] == 2  # the inputs of two convolutions; the last output goes to a mean, which keeps nothing


def test_outside_of_the_context_all_is_kept():
    model, x = Residual(1), torch.randn(2, 3, 8, 8)
    with fastnorm.recompute():
        pass
    y = model.norms[-1](model.stem(x))
    with fastnorm.recompute():
        z = model.convolutions[0](y)
    assert z.grad_fn._saved_input is not None
    assert not hasattr(y.grad_fn, "fastnorm_operands")
    z.sum().backward()


def test_context_is_the_threads_own():
    from concurrent.futures import ThreadPoolExecutor

    model, x = Residual(1), torch.randn(2, 3, 8, 8)
    with fastnorm.recompute(), ThreadPoolExecutor(1) as pool:
        y = pool.submit(lambda: model.norms[-1](model.stem(x))).result()
    assert not hasattr(y.grad_fn, "fastnorm_operands")


def test_views_batch_renorm_and_changed_outputs_are_kept():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    norm, renorm, linear = fastnorm.BatchNorm2d(8), fastnorm.BatchRenorm2d(8), nn.Linear(36, 2)
    with fastnorm.recompute():
        y = linear(norm(x).flatten(2))
        z = F.conv2d(renorm(x), torch.ones(1, 8, 1, 1))
        changed = F.conv2d(norm(x).mul_(2), torch.ones(1, 8, 1, 1, requires_grad=True))
    (y.sum() + z.sum() + changed.sum()).backward()
    plain = x.grad.clone()
    x.grad = None
    (linear(norm(x).flatten(2)).sum() + F.conv2d(renorm(x), torch.ones(1, 8, 1, 1)).sum()
     + F.conv2d(norm(x).mul_(2), torch.ones(1, 8, 1, 1)).sum()).backward()  # fmt: skip
    torch.testing.assert_close(x.grad, plain)


@pytest.mark.parametrize("changed", ("input", "residual", "norm.weight", "convolution.weight", "output"))
def test_what_is_kept_and_changed_in_place_is_an_error(changed):
    """Torch's own check knows nothing of what hooks keep."""
    norm, convolution = fastnorm.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 2, 1)
    x, residual = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    h = x * 1
    with fastnorm.recompute():
        z = convolution(norm(h, residual=residual)).exp()
    loss = z.sum()
    tensors = {"input": h, "residual": residual, "norm.weight": norm.weight, "output": z}
    with torch.no_grad():
        tensors.get(changed, convolution.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_bias_may_change_if_nothing_is_computed_with_it():
    norm, x = fastnorm.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    with fastnorm.recompute():
        loss = norm(x).sum()
        other = nn.Conv2d(3, 2, 1)(norm(x)).sum()
    with torch.no_grad():
        norm.bias.add_(1)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_an_output_written_outside_of_autograd_is_kept():
    torch.manual_seed(0)
    norm, convolution = fastnorm.BatchNorm2d(3, activation="relu").eval(), nn.Conv2d(3, 3, 1)
    x = torch.randn(2, 3, 4, 4)
    gradients = []
    for context in (contextlib.nullcontext(), fastnorm.recompute()):
        with context:
            y = norm(x)
            with torch.no_grad():
                y.mul_(2)
            gradients.append(torch.autograd.grad(convolution(y).sum(), convolution.weight)[0])
    assert torch.equal(*gradients)


def test_a_residual_of_inference_mode():
    norm, convolution = fastnorm.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 1)
    with torch.inference_mode():
        residual = torch.randn(2, 3, 4, 4)
    with fastnorm.recompute():
        loss = convolution(norm(torch.randn(2, 3, 4, 4), residual=residual)).sum()
    loss.backward()


@pytest.mark.parametrize("inside", ("checkpoint", "hooks"))
def test_a_normalisation_under_other_hooks_whose_output_leaves_them(inside):
    """What a checkpoint packs can be unpacked once, by the normalisation's own backward."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3), fastnorm.BatchNorm2d(8, activation="relu"))
    convolution = nn.Conv2d(8, 8, 3)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    wanted = torch.autograd.grad(convolution(block(x)).square().sum(), x)[0]
    with fastnorm.recompute():
        if inside == "checkpoint":
            y = checkpoint(block, x, use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                y = block(x)
        loss = convolution(y).square().sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


def test_double_backward():
    torch.manual_seed(0)
    norm = fastnorm.BatchNorm2d(3, activation="silu", dtype=torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for context in (torch.enable_grad(), fastnorm.recompute()):
        with context:
            loss = F.conv2d(norm(x), weight).square().sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), (x, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_retained_graph_and_checkpoint():
    torch.manual_seed(0)
    model, x = Residual(2), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)
    model.zero_grad()
    with fastnorm.recompute():
        loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * e) for p, e in zip(model.parameters(), expected, strict=True))
    model.zero_grad()
    with fastnorm.recompute():
        loss = checkpoint(model, x, use_reentrant=False).square().mean()
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("with_residual", (False, True))
def test_a_backward_that_needs_no_more_than_an_output_after_another_has_freed_the_graph(with_residual):
    torch.manual_seed(0)
    norms = fastnorm.BatchNorm2d(3), fastnorm.GroupNorm(1, 3, activation="relu")
    one, other = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
    x = torch.randn(2, 3, 4, 4)
    results = []
    for context in (contextlib.nullcontext(), fastnorm.recompute()):
        with context:
            y = norms[0](x)
            y = norms[1](y, residual=y if with_residual else None)
            losses = one(y).sum(), other(y).square().sum()
        losses[0].backward()
        results.append(torch.autograd.grad(losses[1], list(other.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with fastnorm.recompute():  # y is of a graph that was freed
        loss = other(y).square().sum()
    assert torch.equal(torch.autograd.grad(loss, other.weight)[0], results[0][0])


def test_nothing_outlives_backward():
    """Though the outputs do, and with them the nodes of the graph."""
    norm, convolution = fastnorm.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 1)
    x, residual = torch.randn(2, 3, 4, 4).requires_grad_() * 1, torch.randn(2, 3, 4, 4)
    with fastnorm.recompute():
        y = norm(x, residual=residual)
        z = convolution(y)
    kept = [weakref.ref(t) for t in (x, residual)]
    del x, residual
    gc.disable()  # and no cycle holds them
    try:
        assert all(t() is not None for t in kept)
        z.sum().backward()
        assert all(t() is None for t in kept) and y.grad_fn is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("depth, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_depth(depth, error):
    with pytest.raises(error, match="recompute: depth must be"):
        fastnorm.recompute(depth)


def test_readme():
    exec(networks.readme_code("recompute"), names := {})
    assert names["model"][0].weight.grad is not None
