"""Batch normalisation folded into the convolution or linear layer beside it, for inference."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastnorm import batch_norm
from fastnorm.activation import add_and_activate, norm_with_residual
from fastnorm.convert import Skip, check_model, skipped_modules
from fastnorm.state import reachable
from fastnorm.sync_batch_norm import SyncBatchNorm
from fastnorm.trace import PARALLEL, attribute, does_more, trace_everything, writes

Model = TypeVar("Model", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = _CONVOLUTIONS[3:]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *PARALLEL)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm

# A subclass is folded if its forward is still one of these: then it is known what it computes.
_BATCH_NORM_FORWARDS = (
    _BATCH_NORM.forward,
    nn.SyncBatchNorm.forward,
    batch_norm._BatchNorm.forward,
    SyncBatchNorm.forward,
)

_ACTIVATIONS: dict[str | None, type[nn.Module]] = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class FoldedBatchNorm(nn.Module):
    """What :func:`fold_batch_norm` leaves in a batch normalisation's place where nn.Identity or an nn activation do not
    do: activation(input + residual).

    Args:
        activation: None, "relu", "leaky_relu", "silu" or "gelu".
        dims: the number of dimensions that input must have. BatchNorm1d takes (N, C) and (N, C, L), nn.Linear makes C
            the last of any number: only in (N, C) do both mean the same by it. None takes all.

    Raises:
        RuntimeError: input has another number of dimensions.

    Example:
        >>> fastnorm.fold.FoldedBatchNorm("relu")(torch.tensor([-1.0]), residual=torch.tensor([3.0]))
        tensor([2.])
    """

    def __init__(self, activation: str | None = None, dims: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.dims = dims

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.dims is not None and input.dim() != self.dims:
            raise RuntimeError(
                f"FoldedBatchNorm: input must have {self.dims} dimensions, got shape {list(input.shape)}; with others "
                "this batch normalisation cannot be folded: name it in fold_batch_norm(model, skip=...)"
            )
        return add_and_activate(input, residual, self.activation)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in (("activation", self.activation), ("dims", self.dims)) if v)


def fold_batch_norm(model: Model, *, skip: Skip = ()) -> Model:
    """Returns a copy of a model in which batch normalisations are part of the layers beside them; the same outputs.

    In eval mode batch normalisation is y = x * scale + shift, one pair of numbers a channel, which the layer before it
    can apply:

        weight' = weight * scale,   bias' = bias * scale + shift
        scale = weight_bn / sqrt(running_var + eps),   shift = bias_bn - running_mean * scale

    computed in float64. That layer is an nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d (with any groups) or nn.Linear. Or
    else it is the convolution or nn.Linear after it, if no zeros are padded there: weight' = weight * scale over the
    inputs and bias' = bias + sum weight * shift. The normalisation, torch.nn's, fastnorm's or a subclass that keeps
    their forward, leaves nn.Identity behind or its activation as a layer of torch.nn; :class:`FoldedBatchNorm` where
    forward gives it a residual, and where a BatchNorm1d must see that its input has the dimensions that were folded.

    Which layer follows which is found by torch.fx, in the model or, where that cannot be traced, in its parts. Left as
    they are: a layer whose output also goes elsewhere, or that is called at several places where not each leads to this
    normalisation; layers with hooks, of subclasses with a forward of their own, or parametrised; normalisations without
    running statistics.

    Other methods keep their numbers too. Those that forward calls are traced like it; a layer that any other method
    uses, by name as in self.conv(x), is left as it is. What is not seen: a method that gets a layer in another way
    (getattr, hooks, code outside the model's classes), and single layers of a Sequential that a forward which cannot be
    traced, or such a method, takes out.

    What forward reads from attributes and globals when this is called is fixed: a flag that makes it leave a
    normalisation out, or take another way, is to be set before.

    Args:
        model: in eval mode, or at least all its batch normalisations. It is not changed.
        skip: layers to leave as they are, by name or by a function, as :func:`convert` takes them.

    Returns:
        A copy by copy.deepcopy, folded.

    Raises:
        ValueError: a batch normalisation is in training mode; skip has a name that is no module's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), fastnorm.BatchNorm2d(8, activation="relu")).eval()
        >>> fastnorm.fold_batch_norm(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    check_model("fold_batch_norm", model)
    model = copy.deepcopy(model)
    skipped = skipped_modules("fold_batch_norm", model, skip)
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM) and module.training and module not in skipped:
            raise ValueError(
                f"fold_batch_norm: model must be in eval mode, got {type(module).__name__} {name!r} in training mode; "
                "call model.eval() first"
            )
    folding = _Folding(model, skipped)
    progress = True
    while progress:  # a normalisation that is gone may have been between two others
        progress = any([folding.fold(norm) for norm in list(folding.calls) if isinstance(norm, _BATCH_NORM)])
    return model


class _Call:
    """One place where a layer is called: node = layer(input, residual). Folding changes what these are."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def input(self) -> Any:
        if self.node.op == "call_function":  # norm_with_residual(norm, input, residual)
            return self.node.args[1]
        return self.node.args[0] if self.node.args else self.node.kwargs.get("input")

    @property
    def residual(self) -> Any:
        if self.node.op == "call_function":
            return self.node.args[2]
        return self.node.args[1] if len(self.node.args) > 1 else self.node.kwargs.get("residual")


def _leaf(module: nn.Module) -> bool:
    if isinstance(module, (*_CONVOLUTIONS, nn.Linear, _BATCH_NORM, FoldedBatchNorm, torch.jit.ScriptModule)):
        return True
    if isinstance(module, _CONTAINERS) or parametrize.is_parametrized(module):
        return False
    return type(module).__module__.startswith(("torch.nn.", "fastnorm."))


class _Folding:
    """The model that is being folded, and the places where each of its layers is called."""

    def __init__(self, model: nn.Module, untouchable: set[nn.Module]) -> None:
        self.model = model
        self.calls: dict[nn.Module, list[_Call]] = defaultdict(list)
        self.layer_of: dict[fx.Node, nn.Module] = {}
        self.untouchable = untouchable
        self.read_directly: set[int] = set()  # ids of tensors that some forward takes out of a layer
        forwards, used = trace_everything(model, _leaf)
        self.untouchable |= used | reachable(model)[1]
        for module, _, graph, failure, *_ in forwards:
            for node in list(graph.nodes):
                if node.op == "get_attr":
                    self._read(module, node)
                elif node.op == "call_module":
                    self._called(module.get_submodule(node.target), node)
                elif node.op == "call_function" and node.target is norm_with_residual:
                    self._called(module.get_submodule(node.args[0].target), node)
                if failure is not None and node in self.layer_of:
                    self.untouchable.add(self.layer_of[node])
            if failure is not None:  # what else it calls is not known
                self.untouchable.update(module.children())

    def _read(self, module: nn.Module, node: fx.Node) -> None:
        """Of a tensor remembers it; a layer can also be taken out, as the first argument of norm_with_residual."""
        value = attribute(module, node.target)
        if isinstance(value, Tensor):
            self.read_directly.add(id(value))
        elif isinstance(value, nn.Module) and any(user.target is not norm_with_residual for user in node.users):
            self.untouchable.add(value)

    def _called(self, layer: nn.Module, node: fx.Node) -> None:
        if type(layer) is nn.Identity and not does_more(layer) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
            return
        self.layer_of[node] = layer
        self.calls[layer].append(_Call(node))

    def fold(self, norm: nn.Module) -> bool:
        """Folds one normalisation if it can be, and says whether."""
        calls = self.calls[norm]
        if not self._foldable_norm(norm) or not calls:
            return False
        scale, shift = _scale_and_shift(norm)
        before = {self.layer_of.get(call.input) for call in calls}
        after = {self.layer_of.get(user) for call in calls for user in call.node.users}
        if _can_be_beside(norm, before) and all(self._only_leads_to(layer, norm) for layer in before):
            for layer in before:
                _fold_into_outputs(layer, scale, shift)
            self._replace(norm, before)
            return True
        if norm_activation(norm) is not None or any(call.residual is not None for call in calls):
            return False
        if _can_be_beside(norm, after) and all(self._only_comes_from(layer, norm, shift) for layer in after):
            for layer in after:
                _fold_into_inputs(layer, scale, shift)
            self._replace(norm, after)
            return True
        return False

    def _foldable_norm(self, norm: nn.Module) -> bool:
        return (
            type(norm).forward in _BATCH_NORM_FORWARDS
            and norm not in self.untouchable
            and not does_more(norm)
            and norm.running_mean is not None
            and norm.running_var is not None
            and not self.read_directly & {id(t) for t in (*norm.parameters(), *norm.buffers())}
        )

    def _foldable_layer(self, layer: nn.Module | None) -> bool:
        base = next((k for k in (*_CONVOLUTIONS, nn.Linear) if isinstance(layer, k)), None)
        return (
            base is not None
            and type(layer).forward is base.forward
            and getattr(type(layer), "_conv_forward", None) is getattr(base, "_conv_forward", None)
            and layer not in self.untouchable
            and not does_more(layer)
            and not isinstance(layer, LazyModuleMixin)
            and not parametrize.is_parametrized(layer)
            and layer._parameters.get("weight") is not None  # pruning and the old weight_norm compute it
            and layer.weight.is_floating_point()
            and not self.read_directly & {id(t) for t in layer.parameters()}
        )

    def _only_leads_to(self, layer: nn.Module | None, norm: nn.Module) -> bool:
        """Whether the layer can take the normalisation in: whatever it computes is normalised, and nothing else is."""
        if not self._foldable_layer(layer) or _channels_out(layer) != norm.num_features:
            return False
        into = {call.node: call for call in self.calls[norm] if call.residual is not call.input}
        return all(
            len(call.node.users) == 1
            and (user := next(iter(call.node.users))) in into
            and into[user].input is call.node
            for call in self.calls[layer]
        )

    def _only_comes_from(self, layer: nn.Module | None, norm: nn.Module, shift: Tensor) -> bool:
        """Whether the layer after the normalisation can take it in: it sees nothing else, and no zeros either."""
        if not self._foldable_layer(layer) or isinstance(layer, _TRANSPOSED):
            return False
        outputs = {call.node for call in self.calls[norm]}
        padded = isinstance(layer, _CONVOLUTIONS) and any(layer._reversed_padding_repeated_twice)
        return (
            _channels_in(layer) == norm.num_features
            and all(call.input in outputs for call in self.calls[layer])
            and not any(self._written(call) for call in self.calls[norm])
            and (not padded or layer.padding_mode != "zeros" or not shift.any())
        )

    def _written(self, call: _Call) -> bool:
        """Whether a normalisation's input may be written before its output is used, which is to be the same tensor."""
        is_own = isinstance(self.layer_of.get(call.input), (*_CONVOLUTIONS, nn.Linear)) and len(call.input.users) == 1
        users, node = set(call.node.users), call.node
        while users and not is_own:
            node = node.next
            users.discard(node)
            if users and writes(node, self.layer_of.get(node), _leaf):
                return True
        return False

    def _replace(self, norm: nn.Module, layers: set[nn.Module]) -> None:
        """Puts in the normalisation's place what is left of it, in the model and in the graphs."""
        activation = norm_activation(norm)
        calls = self.calls.pop(norm)
        (dims,) = {_dims(layer) for layer in layers}
        dims = None if _input_dims(norm) == (dims,) else dims  # it would have refused others itself
        if dims is not None or any(call.residual is not None for call in calls):
            left: nn.Module = FoldedBatchNorm(activation, dims)
        else:
            left = _ACTIVATIONS[activation]()
        left.train(norm.training)
        for module in list(self.model.modules()):
            for name, child in module._modules.items():
                if child is norm:
                    module._modules[name] = left
        for call in calls:
            if activation is None and call.residual is None:
                call.node.replace_all_uses_with(call.input)
                call.node.graph.erase_node(call.node)
            else:
                self.layer_of[call.node] = left


def norm_activation(norm: nn.Module) -> str | None:
    """fastnorm's layers have it, torch.nn's do not."""
    return getattr(norm, "activation", None)


def _channels_out(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _channels_in(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _dims(layer: nn.Module) -> int:
    """The dimensions of a tensor whose channels the layer and a batch normalisation both take to be the second."""
    return 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)


def _input_dims(norm: nn.Module) -> tuple[int, ...]:
    """The dimensions that the normalisation takes."""
    for kind, dims in ((nn.BatchNorm1d, (2, 3)), (nn.BatchNorm2d, (4,)), (nn.BatchNorm3d, (5,))):
        if isinstance(norm, kind):
            return dims
    return getattr(norm, "_input_dims", (2, 3, 4, 5))


def _can_be_beside(norm: nn.Module, layers: set[nn.Module | None]) -> bool:
    """Whether these layers, if there are any, all work on such tensors as the normalisation takes."""
    if not all(isinstance(layer, (*_CONVOLUTIONS, nn.Linear)) for layer in layers):
        return False
    dims = {_dims(layer) for layer in layers}
    return len(dims) == 1 and dims <= set(_input_dims(norm))


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(C) each, float64: norm(x) = x * scale + shift."""
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        return scale, shift if norm.bias is None else shift + norm.bias.double()


def _fold_into_outputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.detach().double()
    if isinstance(layer, _TRANSPOSED):  # (C_in, C_out / groups, *)
        G = layer.groups
        grouped = weight.reshape(G, -1, *weight.shape[1:])
        folded = grouped * scale.view(G, 1, -1, *[1] * len(layer.kernel_size))
    else:  # (C_out, *)
        folded = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    _set(layer, folded.reshape(weight.shape), bias)


def _fold_into_inputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.detach().double()  # (C_out, C_in / groups, *)
    G = getattr(layer, "groups", 1)
    grouped = weight.reshape(G, -1, weight.size(1), weight[0, 0].numel())
    bias = (grouped * shift.view(G, 1, -1, 1)).sum((2, 3)).flatten()
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    _set(layer, (grouped * scale.view(G, 1, -1, 1)).reshape(weight.shape), bias)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Of the type, layout and requires_grad that the layer's parameters had."""
    old = layer.weight
    like = old if layer.bias is None else layer.bias
    layer.weight = nn.Parameter(torch.empty_like(old).copy_(weight), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(like.dtype), like.requires_grad)
