"""A forecast: a loss and a size at a budget, with intervals and the rule that made it."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError


class NoForecast(UserError, ValueError):
  """There is neither a law nor two isoFLOP minima to forecast from. The message gives every reason."""


class Optimum(NamedTuple):
  """Compute-optimal N and D, and their loss, of the shape of the budgets."""

  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Forecast:
  """The expected loss and size of a run.

  Attributes:
    flops: its budget C.
    params, tokens, loss: N, D, and the loss in nats per token.
    loss_low, loss_high: the interval of the loss of one new run, with its own scatter.
    params_low, params_high, tokens_low, tokens_high: the intervals of the optimum.
    level: of the intervals.
    method: the rule, in words.
    extrapolation: flops over the largest budget that was fitted.
    parts: the loss by each approach, for a rule that takes the mean of several.
    of_smallest: flops over the smallest budget that was fitted; None in files from before it was kept.
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
  of_smallest: float | None = None

  @property
  def distance(self) -> tuple[float, str]:
    """How far the budget is from those fitted: (0.01, 'smallest') below them, else (10.0, 'largest')."""
    # C of the runs of one budget differs by a little.
    if self.of_smallest is not None and self.of_smallest < 0.95:
      return self.of_smallest, 'smallest'
    return self.extrapolation, 'largest'

  def error(self, outcome: float) -> float:
    """(forecast - outcome) / outcome."""
    return self.loss / outcome - 1

  def __str__(self) -> str:
    times, end = self.distance
    return (
      f'C = {self.flops:.3g} ({times:.2g}x the {end} fitted): '
      f'N* = {self.params:.3g} [{self.params_low:.3g}, {self.params_high:.3g}], '
      f'D* = {self.tokens:.3g} [{self.tokens_low:.3g}, {self.tokens_high:.3g}], '
      f'loss {self.loss:.4f} [{self.loss_low:.4f}, {self.loss_high:.4f}] ({self.method})'
    )
