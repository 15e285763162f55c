"""IsoFLOP curves, their minima, and the power laws through them: the results of approaches 1 and 2."""

import dataclasses

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from research.core.errors import UserError
from research.scaling import bootstrap

DEGREE = {'parabola': 2, 'cubic': 3}  # of the polynomial in ln N


@dataclasses.dataclass(frozen=True)
class Profile:
  """One isoFLOP curve: loss against ln N at one budget, and its minimum.

  Attributes:
    flops: the budget C.
    params, tokens, loss: of its runs [sizes], in rising N; loss in nats per token.
    method: how the curve is interpolated, one of `approaches.METHODS`.
    params_opt, tokens_opt, loss_opt: the minimum; NaN for a curve that is refused.
    refused: why the curve does not count; None if it does.
    warnings: sentences for a reader.
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
  """y = floor + exp(ln_k) C^exponent, fitted in logarithms.

  `error` is the standard error of the exponent; NaN for two points, which leave no residual.
  """

  exponent: float
  ln_k: float
  error: float = np.nan
  floor: float = 0.0

  def __call__(self, flops):
    return self.floor + np.exp(self.ln_k + self.exponent * np.log(flops))


@dataclasses.dataclass(frozen=True)
class Allocation:
  """N*(C), D*(C) and the lowest loss L*(C) as power laws through the optima of approach 1 or 2.

  Attributes:
    approach: 1 or 2.
    samples: bootstrapped (exponent, ln k) of N*, D* and L* less its floor [replicates, 6]; one row of NaN
      where no bootstrap was possible.
    drift: how far the optimum moves against the centre of the grid; see `approaches.isoflop`.
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
    """The profiles that count."""
    return [p for p in self.profiles if p.refused is None]

  def interval(self, which: str = 'a', level: float = 0.9) -> tuple[float, float]:
    """(low, high) of the exponent a (N* ~ C^a) or b (D* ~ C^b); NaN where no bootstrap was possible."""
    low, high = bootstrap.interval(self.samples[:, {'a': 0, 'b': 2}[which]], level)
    return float(low), float(high)


class NoAllocation(UserError, ValueError):
  """There are too few optima for a power law: the message lists every curve's reason."""


def interpolant(ln_n, loss, method):
  """A function of ln N that goes through the losses (Akima) or near them (a polynomial)."""
  if method == 'akima':
    return Akima1DInterpolator(ln_n, loss)
  # Centred: powers of ln N near 20 alone would be nearly collinear.
  center = ln_n.mean()
  coefficients = np.polyfit(ln_n - center, loss, DEGREE[method])

  def polynomial(x):
    return np.polyval(coefficients, x - center)

  return polynomial


def power_law(flops, values, weights=None, floor: float = 0.0) -> PowerLaw:
  """Weighted least squares of ln (values - floor) on ln C."""
  x = np.log(flops)
  y = np.log(values - floor)
  w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
  x_mean = np.average(x, weights=w)
  y_mean = np.average(y, weights=w)
  x_squares = (w * (x - x_mean) ** 2).sum()
  slope = (w * (x - x_mean) * (y - y_mean)).sum() / x_squares
  residual = y - y_mean - slope * (x - x_mean)
  freedom = len(x) - 2
  error = np.sqrt((w * residual**2).sum() / freedom / x_squares) if freedom > 0 else np.nan
  return PowerLaw(float(slope), float(y_mean - slope * x_mean), float(error), floor)
