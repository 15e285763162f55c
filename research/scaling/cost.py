"""The cost of a run: training FLOPs as a function of N and D, fitted to rows, and chip-hours."""

import dataclasses

import numpy as np
from scipy import optimize

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cost:
  """Training FLOPs C(N, D) = (k N^p + constant) D; the default is 6 N D.

  Other conventions are fitted to rows: a power of N, or a line in N, as where a head or the attention costs the
  same at every size. Each method gives one of C, N and D from the other two; arrays broadcast.
  """

  k: float = 6.0
  p: float = 1.0
  worst: float = 0.0  # largest relative deviation of the rows it was fitted to
  constant: float = 0.0

  def per_token(self, params):
    """Training FLOPs of one token."""
    return self.k * np.asarray(params, np.float64) ** self.p + self.constant

  def flops(self, params, tokens):
    """C of a run."""
    return self.per_token(params) * tokens

  def tokens(self, params, flops):
    """The D that a budget buys at a size."""
    return np.asarray(flops, np.float64) / self.per_token(params)

  def params(self, tokens, flops):
    """The N at which a budget buys so many tokens."""
    return ((np.asarray(flops, np.float64) / tokens - self.constant) / self.k) ** (1 / self.p)

  def __str__(self) -> str:
    off = f' (rows deviate by up to {self.worst:.1%})' if self.worst > 1e-3 else ''
    if self.constant:
      return f'C = ({self.k:.4g} N + {self.constant:.3g}) D{off}'
    power = '' if self.p == 1.0 else f'^{self.p:.4f}'
    return f'C = {self.k:.4g} N{power} D{off}'


SIX_ND = Cost()
TWO_ND = Cost(2.0)  # of the forward pass alone


def fit_cost(params, tokens, flops) -> Cost:
  """The FLOP convention of rows: 6 N D where that fits exactly, else k N D, k N^p D or (k N + constant) D.

  Of the last two it takes the one that deviates less. The constant is not negative.

  Args:
    params, tokens, flops: N, D and C of the rows [rows].
  """
  per_token = np.log(np.asarray(flops) / np.asarray(tokens))
  n = np.log(np.asarray(params))
  if np.allclose(per_token - n, np.log(6.0), atol=1e-6):
    return Cost()
  # A single size says nothing about the power of N.
  if np.ptp(n) < 1e-9:
    return Cost(float(np.exp((per_token - n).mean())), 1.0)
  if np.ptp(per_token - n) < 0.02:  # proportional to N D up to the rounding of figures
    k = float(np.exp(np.median(per_token - n)))
    k = 6.0 if abs(k / 6 - 1) < 0.01 else k
    return Cost(k, 1.0, float(np.abs(np.expm1(per_token - n - np.log(k))).max()))
  p, ln_k = np.polyfit(n, per_token, 1)
  worst = float(np.abs(np.expm1(per_token - p * n - ln_k)).max())
  power = Cost(float(np.exp(ln_k)), float(p), worst)
  # Relative least squares, so that the small sizes count as the large ones do.
  weight = np.exp(-per_token)
  columns = np.stack([np.exp(n), np.full_like(n, np.exp(n).mean())], 1)
  (slope, level), _ = optimize.nnls(columns * weight[:, None], np.ones_like(n))
  if slope <= 0:
    return power
  line = Cost(float(slope), 1.0, constant=float(level * np.exp(n).mean()))
  worst = float(np.abs(line.per_token(np.exp(n)) * weight - 1).max())
  # The power is the default: a line must be clearly better.
  return dataclasses.replace(line, worst=worst) if worst < 0.9 * power.worst else power


def not_six_nd(cost: Cost, params, tokens, flops) -> str | None:
  """A sentence where the rows' C is not 6 N D; None where it is, up to the rounding of figures."""
  ratio = 6 * np.asarray(params) * np.asarray(tokens) / np.asarray(flops)
  if np.abs(np.log(ratio)).max() < 0.02:
    return None
  # By N, since the ratio usually changes with the size.
  order = np.argsort(params, kind='stable')
  sentence = (
    f'C is not 6 N D here: 6 N D / C runs from {ratio[order[0]]:.3g} at the smallest size to '
    f'{ratio[order[-1]]:.3g} at the largest; the fit uses {cost}, and budgets and optima are in C.'
  )
  if cost.worst > 0.05:
    sentence += (
      ' No one count of FLOPs fits every row: check the column, or leave it out for 6 N D.'
    )
  return sentence


def chip_hours(flops: float, *, step_flops: float, step_seconds: float, chips: int = 1) -> float:
  """Chip-hours of a run of `flops`.

  Args:
    step_flops, step_seconds: FLOPs and time of a step, measured or compiled, on `chips` chips.

  Raises:
    UserError: one of these is not positive.
  """
  if step_flops <= 0 or step_seconds <= 0 or chips < 1:
    raise UserError(
      'chip_hours needs a positive step_flops and step_seconds, and at least one chip.'
    )
  return flops / step_flops * step_seconds * chips / 3600
