"""From torch.nn's layers to fastnorm's and back, in a model that exists already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastnorm import batch_norm, dropout, group_norm, instance_norm, layer_norm, local_response_norm, rms_norm
from fastnorm.sync_batch_norm import SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)
Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]

_ACTIVATION: dict[str, Any] = {"activation": None}
_BATCH: dict[str, Any] = {"activation": None, "skip_nonfinite_stats": False}
_LRN: dict[str, Any] = {"region": "inter", "convention": "torch"}

# torch.nn's class, fastnorm's, and the attributes that only fastnorm's has, at the value that makes the two the same
_COUNTERPARTS: tuple[tuple[type[nn.Module], type[nn.Module], dict[str, Any]], ...] = (
    (nn.BatchNorm1d, batch_norm.BatchNorm1d, _BATCH),
    (nn.BatchNorm2d, batch_norm.BatchNorm2d, _BATCH),
    (nn.BatchNorm3d, batch_norm.BatchNorm3d, _BATCH),
    (nn.SyncBatchNorm, SyncBatchNorm, _BATCH),
    (nn.LayerNorm, layer_norm.LayerNorm, _ACTIVATION),
    (nn.RMSNorm, rms_norm.RMSNorm, _ACTIVATION),
    (nn.GroupNorm, group_norm.GroupNorm, _ACTIVATION),
    (nn.InstanceNorm1d, instance_norm.InstanceNorm1d, _ACTIVATION),
    (nn.InstanceNorm2d, instance_norm.InstanceNorm2d, _ACTIVATION),
    (nn.InstanceNorm3d, instance_norm.InstanceNorm3d, _ACTIVATION),
    (nn.LocalResponseNorm, local_response_norm.LocalResponseNorm, _LRN),
    (nn.Dropout, dropout.Dropout, {}),
    (nn.Dropout1d, dropout.Dropout1d, {}),
    (nn.Dropout2d, dropout.Dropout2d, {}),
    (nn.Dropout3d, dropout.Dropout3d, {}),
    (nn.AlphaDropout, dropout.AlphaDropout, {}),
    (nn.FeatureAlphaDropout, dropout.FeatureAlphaDropout, {}),
)
_OF_TORCH = {theirs: (ours, attributes) for theirs, ours, attributes in _COUNTERPARTS}
_OF_FASTNORM = {ours: (theirs, attributes) for theirs, ours, attributes in _COUNTERPARTS}

# What a layer of the report is: everything that normalises or drops, in torch.nn ...
_TORCH_KINDS = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
# ... and here, with what torch.nn has no counterpart for.
_FASTNORM_KINDS = (batch_norm._BatchNorm, dropout._Dropout, *_OF_FASTNORM)

# Set by convert, taken away by revert: torch's alpha dropouts ignore inplace=True and fastnorm's do not, so that a
# converted one has inplace=False and remembers.
_IGNORED_INPLACE = "_inplace_that_torch_ignores"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`conversion_report` says of a model's normalisation and dropout layers, by their names in the model.

    Attributes:
        fastnorm: layers that are fastnorm's, with their classes.
        convertible: torch.nn's, which convert would change, with their classes.
        left: the others, which convert leaves as they are, with the reason.
    """

    fastnorm: dict[str, str] = field(default_factory=dict)
    convertible: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, layers in (
            ("fastnorm", self.fastnorm),
            ("convertible", self.convertible),
            ("left as they are", self.left),
        ):
            lines.append(f"{title}: {len(layers)}")
            lines += [f"  {name or '(the model)'}: {text}" for name, text in layers.items()]
        return "\n".join(lines)


def convert(model: Model, *, skip: Skip = ()) -> Model:
    """Makes every torch.nn normalisation and dropout layer of a model fastnorm's, in place.

    Each layer stays the object it was and only changes its class. So its parameters and buffers, and with them
    optimisers and state_dict, its hooks, names, attributes, training flag, device and data type are what they were, and
    a layer that occurs twice in the model still does. The numbers stay the same up to rounding; dropout draws other
    masks from the same seed.

    Layers of exactly torch.nn's classes change. Left as they are, and told by :func:`conversion_report` with the
    reason: subclasses (their forward may do something else), lazy layers before their first batch, parametrised,
    quantised and scripted layers, layers whose ``forward`` was replaced on the instance, layers that have an attribute
    or a submodule by the name of a setting of fastnorm's (``activation``, ``skip_nonfinite_stats``, ``region``,
    ``convention``).

    Tools that go by exactly torch.nn's classes, as torch.ao.quantization.fuse_modules does, do not know fastnorm's:
    call them before this, or after :func:`revert`.

    Args:
        model: any module, also a single layer.
        skip: names of modules, as model.named_modules() has them, that are left as they are with everything inside; or
            a function of name and module that returns True for these.

    Returns:
        The model itself.

    Raises:
        ValueError: skip has a name that is no module's; nothing has been changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.5))
        >>> model = fastnorm.convert(model, skip=["2"])
        >>> type(model[1]), type(model[2])
        (<class 'fastnorm.batch_norm.BatchNorm2d'>, <class 'torch.nn.modules.dropout.Dropout'>)
    """
    for _, module, reason in list(_layers(model, skip)):
        if reason is None and type(module) in _OF_TORCH:
            to_fastnorm(module)
    return model


def becomes_norm(module: nn.Module) -> bool:
    """Whether :func:`to_fastnorm` makes a normalisation with an activation of it."""
    return type(module) in _OF_TORCH and "activation" in _OF_TORCH[type(module)][1] and _reason(module) is None


def to_fastnorm(module: nn.Module) -> None:
    """Changes one layer of exactly a torch.nn class."""
    module.__class__, attributes = _OF_TORCH[type(module)]
    module.__dict__.update(attributes)
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout) and module.inplace:
        module.inplace = False
        setattr(module, _IGNORED_INPLACE, True)


def revert(model: Model) -> Model:
    """Makes every fastnorm layer of a model torch.nn's again, in place: the inverse of :func:`convert`.

    A layer that does what torch.nn's cannot stays fastnorm's, and one warning names all of them: a fused activation,
    ``skip_nonfinite_stats=True``, LocalResponseNorm's ``region`` and ``convention``, BatchRenorm, DropPath, subclasses.
    A model whose forward gives ``residual=`` to a layer needs fastnorm's and must not be reverted.

    Args:
        model: any module, also a single layer.

    Returns:
        The model itself.

    Warns:
        UserWarning: layers that stay.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Dropout(0.5))
        >>> type(fastnorm.revert(fastnorm.convert(model))[0])
        <class 'torch.nn.modules.normalization.LayerNorm'>
    """
    check_model("revert", model)
    kept = []
    for name, module in model.named_modules():
        if not isinstance(module, _FASTNORM_KINDS):
            continue
        if type(module) not in _OF_FASTNORM:
            kept.append(f"{name or '(the model)'} ({type(module).__name__})")
            continue
        theirs, attributes = _OF_FASTNORM[type(module)]
        own = [f"{key}={getattr(module, key)!r}" for key, value in attributes.items() if getattr(module, key) != value]
        if own:
            kept.append(f"{name or '(the model)'} ({', '.join([type(module).__name__, *own])})")
            continue
        module.__class__ = theirs
        for key in attributes:
            del module.__dict__[key]
        if module.__dict__.pop(_IGNORED_INPLACE, False):
            module.inplace = True
    if kept:
        warnings.warn(f"revert: torch.nn has no counterpart for {'; '.join(kept)}", stacklevel=2)
    return model


def conversion_report(model: nn.Module, *, skip: Skip = ()) -> ConversionReport:
    """Says of every normalisation and dropout layer whether it is fastnorm's, would become so, or why not.

    Before :func:`convert` it is a rehearsal, after it the result. Nothing is changed.

    Args:
        model, skip: as convert takes them.

    Raises:
        ValueError: skip has a name that is no module's.

    Example:
        >>> class Scaled(torch.nn.LayerNorm):
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), Scaled(4))
        >>> print(fastnorm.conversion_report(fastnorm.convert(model)))
        fastnorm: 1
          1: LayerNorm
        convertible: 0
        left as they are: 1
          2: Scaled is a subclass of LayerNorm, its forward may do something else
    """
    report = ConversionReport()
    for name, module, reason in _layers(model, skip):
        if isinstance(module, _FASTNORM_KINDS):
            report.fastnorm[name] = type(module).__name__
        elif reason is None:
            report.convertible[name] = type(module).__name__
        else:
            report.left[name] = reason
    return report


def _layers(model: nn.Module, skip: Skip) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Name, module and the reason not to convert it, of everything that normalises or drops, each module once."""
    skipped = skipped_modules("convert", model, skip)
    for name, module in model.named_modules():
        reason = _reason(module)
        if reason is None and type(module) not in _OF_TORCH and not isinstance(module, _FASTNORM_KINDS):
            continue
        yield name, module, "skipped" if module in skipped else reason


def check_model(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {got}")


def skipped_modules(op: str, model: nn.Module, skip: Skip) -> set[nn.Module]:
    """What ``skip`` tells, with everything inside. A shared module needs to be named only once."""
    check_model(op, model)
    if isinstance(skip, type):
        raise TypeError(f"{op}: skip must be names or a function of name and module, got the class {skip.__name__}")
    if callable(skip):
        roots = [module for name, module in model.named_modules() if skip(name, module)]
    else:
        roots = []
        for name in [skip] if isinstance(skip, str) else skip:
            try:
                roots.append(model.get_submodule(name))
            except AttributeError:
                raise ValueError(f"{op}: skip must name modules of the model, got {name!r}") from None
    return {module for root in roots for module in root.modules()}


def _reason(module: nn.Module) -> str | None:
    """Why a layer is not converted; None if it can be, if it is fastnorm's, or if it neither normalises nor drops."""
    kind = type(module)
    if kind in _OF_TORCH:
        if "forward" in vars(module):
            return f"{kind.__name__} has a forward of its own, set on the instance"
        taken = next((name for name in _OF_TORCH[kind][1] if hasattr(module, name)), None)
        return None if taken is None else f"{kind.__name__} has an attribute {taken}, a setting of fastnorm's"
    if isinstance(module, _FASTNORM_KINDS):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
        reason = f"{name} is scripted, which fastnorm's layers cannot be"
        return reason if name in {k.__name__ for k in _OF_TORCH} else None
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
        return f"{kind.__name__} has its dropout (p={module.dropout}) inside"
    if not isinstance(module, _TORCH_KINDS):
        return None
    if isinstance(module, LazyModuleMixin):
        return f"{kind.__name__} is lazy, convert after the first batch"
    if parametrize.is_parametrized(module):
        return f"{kind.__name__} is parametrised, convert before registering the parametrisation"
    if kind.__module__.startswith("torch.ao."):
        return f"{kind.__name__} is quantised"
    if kind.__module__.startswith("torch.nn."):
        return f"fastnorm has no {kind.__name__}"
    base = next(k for k in kind.__mro__ if k.__module__.startswith("torch.nn."))
    return f"{kind.__name__} is a subclass of {base.__name__}, its forward may do something else"
