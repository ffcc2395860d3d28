"""Learning-rate schedules: `(epoch, epochs) -> factor`, by which the recipe's learning rate is multiplied.

`epoch` counts from the start of the stage and is a fraction inside an epoch; `epochs` is the stage's length. A schedule
keeps no state, so a run that is taken up again needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float, float], float]


@dataclass(frozen=True)
class Constant:
    """1 throughout."""

    def __call__(self, epoch: float, epochs: float) -> float:
        return 1.0


constant = Constant()


@dataclass(frozen=True)
class Exponential:
    """gamma ** (whole epochs done)."""

    gamma: float = 0.96

    def __call__(self, epoch: float, epochs: float) -> float:
        return self.gamma ** int(epoch)


@dataclass(frozen=True)
class Step:
    """gamma ** (how many of the shares `at` of the run are over)."""

    gamma: float = 0.1
    at: tuple[float, ...] = (0.5, 0.75)

    def __call__(self, epoch: float, epochs: float) -> float:
        return self.gamma ** sum(epoch >= share * epochs for share in self.at)


@dataclass(frozen=True)
class Cosine:
    """(1 + cos(pi * epoch / epochs)) / 2, from 1 to 0 (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    def __call__(self, epoch: float, epochs: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


@dataclass(frozen=True)
class Linear:
    """1 - epoch / epochs."""

    def __call__(self, epoch: float, epochs: float) -> float:
        return 1.0 - epoch / epochs


@dataclass(frozen=True)
class WarmUp:
    """Rises linearly from 0 to 1 during the first `share` of the run, then follows `after` for the rest of it."""

    after: Schedule
    share: float = 0.1

    def __call__(self, epoch: float, epochs: float) -> float:
        rising = self.share * epochs
        return epoch / rising if epoch < rising else self.after(epoch - rising, epochs - rising)
