"""Which form of law the rows prefer, by AICc, and along which axis the fitted law misses them.

Chinchilla fixes gamma = 1 and TiedChinchilla alpha = beta as well; GammaChinchilla has all six parameters free.
Each is fitted by least squares of ln L from several starts in numpy, which takes a tenth of a second and
compiles nothing.
"""

import operator
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from research.scaling import prior_fit
from research.scaling.rows import Observations

# theta = FREE @ coordinates, [6, free], in the order of prior_fit.NAMES. A row of zeros is ln gamma = 0.
FREE = {
  'Chinchilla': np.eye(6)[:, :5],
  'TiedChinchilla': np.column_stack([np.eye(6)[:, :3], np.eye(6)[:, 3] + np.eye(6)[:, 4]]),
  'GammaChinchilla': np.eye(6),
}
# A misfit of ln L that bends by less than this is not worth a sentence.
LEAST = 0.003
# The level of the F test of a misfit: strict, since every table is tested along four axes.
SIGNIFICANCE = 1e-4


class Compared(NamedTuple):
  """A law on the rows."""

  law: str
  parameters: int
  rms: float  # of the residuals of ln L
  aicc: float
  weight: float  # Akaike weight, the share of the evidence among the laws that are compared


class Misfit(NamedTuple):
  """A parabola through the residuals: where it is lowest and highest, and by how much the law is off there.

  `low` and `high` are in ln L, less the mean residual, so that `low` is negative and `high` positive.
  """

  axis: str
  explained: float  # share of the residuals' variance
  at_low: float
  low: float
  at_high: float
  high: float


def aicc(rss: float, n: int, k: int) -> float:
  """AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) of least squares (Hurvich & Tsai 1989).

  Args:
    rss: the sum of n squared residuals, above 0.
    k: the number of parameters, with the error's variance.
  """
  return float(n * np.log(rss / n) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1e-9))


def compare(rows: Observations) -> list[Compared]:
  """The three laws by AICc, best first. Laws with as many parameters as rows, or more, are left out."""
  n = len(rows)
  results = []
  for name, free in FREE.items():
    k = free.shape[1] + 1
    if n <= k + 1:
      continue
    # A law that fits exactly would have an AICc of minus infinity.
    rss = max(_least_squares(rows, free), 1e-24 * n)
    results.append((name, k - 1, float(np.sqrt(rss / n)), aicc(rss, n, k)))
  results.sort(key=operator.itemgetter(3))
  relative = [np.exp((results[0][3] - value) / 2) for *_, value in results]
  weights = [float(part / sum(relative)) for part in relative]
  return [Compared(*result, weight) for result, weight in zip(results, weights, strict=True)]


def _least_squares(rows: Observations, free: np.ndarray) -> float:
  """The lowest sum of squared residuals of ln L over several starts."""
  y = np.log(rows.loss)
  x = np.log(rows.params)
  x = x - x.mean()
  z = np.log(rows.tokens)
  z = z - z.mean()

  def residual(coordinates):
    return prior_fit.evaluate(free @ coordinates, x, z).value - y

  def slopes(coordinates):
    return prior_fit.evaluate(free @ coordinates, x, z).slopes @ free

  # A tied coordinate moves two of theta, whose bounds are the same: take those of the first.
  moved = free.argmax(axis=0)
  low = np.array(prior_fit.LOW)[moved]
  high = np.array(prior_fit.HIGH)[moved]
  middle = float(np.exp(y.mean()))
  lowest = float(np.exp(y.min()))
  best = np.inf
  # The floor is badly conditioned: start at several shares of the lowest loss, with the rest split evenly.
  for share in (0.1, 0.5, 0.9):
    for p in (-1.8, -1.0):
      half = np.log(max(middle - share * lowest, 1e-3 * middle) / 2)
      full = np.array([np.log(share * lowest), half, half, p, p, 0.0])
      start = np.clip(np.linalg.lstsq(free, full, rcond=None)[0], low + 1e-6, high - 1e-6)
      fitted = optimize.least_squares(
        residual, start, jac=slopes, bounds=(low, high), x_scale='jac', xtol=1e-12, max_nfev=300
      )
      best = min(best, 2 * fitted.cost)
  return best


def sentence(compared: list[Compared], fixed: Collection[str] = ()) -> str | None:
  """What the comparison says, in one sentence; None where fewer than two laws could be compared.

  Args:
    fixed: the parameters that the fit holds; they are free in the comparison, and the sentence says so.
  """
  if len(compared) < 2:
    return None
  first, *others = compared
  gaps = ', '.join(f'{c.law} {c.aicc - first.aicc:+.1f} ({100 * c.rms:.2g}% rms)' for c in others)
  sure = 'clearly' if others[0].aicc - first.aicc > 6 else 'not clearly'
  return (
    f'AICc is lowest for {first.law} ({100 * first.rms:.2g}% rms), {sure}: {gaps}; '
    'a difference of 2 is nothing, one of 10 decides'
    + (f'; they leave {", ".join(fixed)} free.' if fixed else '.')
  )


def misfit(rows: Observations, residuals: np.ndarray) -> Misfit | None:
  """The axis along which the fitted law misses the rows most; None where no trend is clear beside the scatter.

  For each of N, D, C and D / N a parabola in ln x is fitted to the residuals, without the rows that are more
  than 8 robust standard deviations off. A trend is clear where the parabola beats a constant at one in ten
  thousand (F test), explains a fifth of the variance and bends by more than 0.3%.

  Args:
    residuals: ln(fitted / observed) [rows].
  """
  spread = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
  near = np.abs(residuals - np.median(residuals)) <= 8 * spread + 1e-12
  residual = residuals[near]
  if len(residual) < 12 or spread < 1e-9:
    return None
  axes = {'N': rows.params, 'D': rows.tokens, 'C': rows.flops, 'D / N': rows.tokens / rows.params}
  misfits = []
  for axis, values in axes.items():
    x = np.log(values[near])
    if len(np.unique(np.round(x, 6))) < 4:
      continue
    curve = np.polynomial.Polynomial.fit(x, residual, 2)
    rest = float(((residual - curve(x)) ** 2).sum())
    total = float(((residual - residual.mean()) ** 2).sum())
    ratio = (total - rest) / 2 / (rest / (len(residual) - 3))
    order = curve(np.sort(x)) - residual.mean()
    low, high = int(order.argmin()), int(order.argmax())
    places = np.exp(np.sort(x))
    clear = stats.f.sf(ratio, 2, len(residual) - 3) < SIGNIFICANCE and rest < 0.8 * total
    if clear and order[high] - order[low] > LEAST:
      share = 1 - rest / total
      misfits.append(Misfit(axis, share, places[low], order[low], places[high], order[high]))
  return max(misfits, key=operator.attrgetter('explained'), default=None)


def describe(trend: Misfit) -> str:
  """The misfit in a sentence."""
  return (
    f'the law misses a trend along {trend.axis}: it lies {-np.expm1(trend.low):.1%} below the runs '
    f'near {trend.at_low:.2g} and {np.expm1(trend.high):.1%} above them near {trend.at_high:.2g} '
    f'(a parabola in ln {trend.axis} explains {trend.explained:.0%} of the residuals). Fit a '
    'narrower range, or a law with another shape, before a forecast far beyond the runs.'
  )
