"""IsoFLOP curves, their minima, and the power laws through them: what approaches 1 and 2 find."""

import dataclasses

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from research.core.errors import UserError
from research.scaling import bootstrap

DEGREE = {'parabola': 2, 'cubic': 3}


@dataclasses.dataclass(frozen=True)
class Profile:
  """One isoFLOP curve: loss against ln N at one budget, and its minimum.

  `refused` says why the curve does not count (then the optimum is NaN); `warnings` what to look at.
  """

  flops: float
  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray
  method: str
  params_opt: float = np.nan
  tokens_opt: float = np.nan
  loss_opt: float = np.nan
  refused: str | None = None
  warnings: tuple[str, ...] = ()

  def curve(self, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(N, loss) along the fitted profile, within the sizes that were run."""
    ln_n = np.linspace(np.log(self.params.min()), np.log(self.params.max()), points)
    return np.exp(ln_n), interpolant(np.log(self.params), self.loss, self.method)(ln_n)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = floor + exp(ln_k) C^exponent, fitted in logarithms; `error` is the exponent's standard error."""

  exponent: float
  ln_k: float
  error: float = np.nan
  floor: float = 0.0

  def __call__(self, flops):
    return self.floor + np.exp(self.ln_k + self.exponent * np.log(flops))


@dataclasses.dataclass(frozen=True)
class Allocation:
  """N*(C), D*(C) and the lowest loss L*(C) as power laws through the optima of approach 1 or 2.

  `samples` [replicates, 6]: exponent and ln k of N*, of D* and of L* (less its floor) under a bootstrap.
  """

  approach: int
  method: str
  params: PowerLaw
  tokens: PowerLaw
  loss: PowerLaw
  profiles: tuple[Profile, ...]
  samples: np.ndarray
  drift: float = 0.0

  @property
  def used(self) -> list[Profile]:
    return [p for p in self.profiles if p.refused is None]

  def interval(self, which: str = 'a', level: float = 0.9) -> tuple[float, float]:
    """Of a (N* ~ C^a) or b (D* ~ C^b); NaN where no bootstrap was possible."""
    low, high = bootstrap.interval(self.samples[:, {'a': 0, 'b': 2}[which]], level)
    return float(low), float(high)


class NoAllocation(UserError, ValueError):
  """No power law can be drawn through the optima: the message lists every curve's reason."""


def interpolant(ln_n, loss, method):
  if method == 'akima':
    return Akima1DInterpolator(ln_n, loss)
  center = ln_n.mean()
  coefficients = np.polyfit(ln_n - center, loss, DEGREE[method])
  return lambda x: np.polyval(coefficients, x - center)


def power_law(flops, values, weights=None, floor: float = 0.0) -> PowerLaw:
  """Weighted least squares of ln (values - floor) on ln C."""
  x, y = np.log(flops), np.log(values - floor)
  w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
  mx, my = np.average(x, weights=w), np.average(y, weights=w)
  sxx = (w * (x - mx) ** 2).sum()
  slope = (w * (x - mx) * (y - my)).sum() / sxx
  rest = y - my - slope * (x - mx)
  dof = len(x) - 2
  error = np.sqrt((w * rest**2).sum() / dof / sxx) if dof > 0 else np.nan
  return PowerLaw(float(slope), float(my - slope * mx), float(error), floor)
