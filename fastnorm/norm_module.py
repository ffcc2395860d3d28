"""What the normalisations' modules have in common. Each class here stands before torch.nn's among a module's bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastnorm.compile import refuse_scripting
from fastnorm.overrides import recorded_call


class NormModule(nn.Module):
    """A norm with an activation."""

    activation: str | None
    __prepare_scriptable__ = refuse_scripting

    def _parameters_of_forward(self) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias. Module.__getattr__ takes 0.3 us a tensor; not in the dictionary is a parametrised one, one
        of DataParallel's replicas, and one that was deleted and set anew. Running statistics are read likewise.
        """
        parameters = self._parameters
        try:
            return parameters["weight"], parameters["bias"]
        except KeyError:
            return self.weight, self.bias

    def _overridden(
        self, function: Callable[..., Tensor], input: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """forward by the functional, where an argument or a mode has a __torch_function__, see overrides.py."""
        call = recorded_call(self, input, residual)
        return function(input, *args, residual=residual, activation=self.activation, **kwargs) if call is None else call

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")


class ChannelNormModule(NormModule):
    """A norm with a weight and a bias for each channel, of which either may be None."""

    def reset_parameters(self) -> None:
        if isinstance(self, nn.modules.batchnorm._NormBase):
            self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)


class RankedNormModule(ChannelNormModule):
    """One of three that differ in the number of dimensions they take."""

    _input_dims: tuple[int, ...]
    _input_shape: str

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._input_dims:
            raise ValueError(
                f"{type(self).__name__}: input must have shape {self._input_shape}, got {input.dim()} dimensions with "
                f"shape {list(input.shape)}"
            )
