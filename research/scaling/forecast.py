"""What a forecast is: a loss and a size at a budget, with intervals, and by which rule."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError


class NoForecast(UserError, ValueError):
  """Neither a law nor two isoFLOP minima: nothing to forecast with. The message gives every reason."""


class Optimum(NamedTuple):
  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a run at `flops` should reach; intervals at `level`, that of the loss for one new run with its noise.

  `method` says in words which rule made it. `extrapolation` is flops over the largest budget that was fitted.
  A rule that takes the mean of several approaches has each one's loss in `parts`.
  """

  flops: float
  params: float
  tokens: float
  loss: float
  loss_low: float
  loss_high: float
  params_low: float
  params_high: float
  tokens_low: float
  tokens_high: float
  level: float
  method: str
  extrapolation: float
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def error(self, outcome: float) -> float:
    """(forecast - outcome) / outcome."""
    return self.loss / outcome - 1

  def __str__(self) -> str:
    return (
      f'C = {self.flops:.3g} ({self.extrapolation:.2g}x the largest fitted): '
      f'N* = {self.params:.3g} [{self.params_low:.3g}, {self.params_high:.3g}], '
      f'D* = {self.tokens:.3g} [{self.tokens_low:.3g}, {self.tokens_high:.3g}], '
      f'loss {self.loss:.4f} [{self.loss_low:.4f}, {self.loss_high:.4f}] ({self.method})'
    )
