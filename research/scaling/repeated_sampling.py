"""Repeated sampling: pass@k from counts of successes, and its forecast from a beta-binomial distribution.

A problem is attempted n times and solved c times. pass@k is the chance that at least one of k attempts solves
it. Coverage is its mean over problems.
"""

import dataclasses
import operator

import numpy as np
from scipy import optimize, special, stats

from research.core.errors import UserError


def pass_at_k(samples, correct, k) -> np.ndarray:
  """The unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).

  The paper is arXiv:2107.03374. The ratio of binomial coefficients is a product of min(c, k) factors. Its
  logarithm is summed by log1p, so that nothing overflows, and a small pass@k keeps all its digits.

  Args:
    samples: n, attempts at each problem; any shape.
    correct: c, how many of them solved it; broadcasts against `samples`.
    k: attempts that are allowed; broadcasts against both.

  Returns:
    The estimates, in [0, 1], of the broadcast shape.

  Raises:
    UserError: a count is no whole number, c is above n, or k is above n: n attempts say nothing about more.
  """
  n, c, k = np.broadcast_arrays(samples, correct, k)
  _check_counts(n, c, k)
  estimates = [_pass_at_k(*map(int, counts)) for counts in zip(n.flat, c.flat, k.flat, strict=True)]
  return np.array(estimates).reshape(n.shape)


def _pass_at_k(n: int, c: int, k: int) -> float:
  if n - c < k:
    return 1.0  # too few failures to fill k attempts
  # C(n - c, k) / C(n, k) is symmetric in c and k: take the product with fewer factors.
  few, many = sorted((c, k))
  return float(-np.expm1(np.log1p(-many / (n - np.arange(few))).sum()))


def _check_counts(n, c, k) -> None:
  """Raises UserError unless the counts are whole numbers with 1 <= k <= n and 0 <= c <= n."""
  for name, values in (('samples', n), ('correct', c), ('k', k)):
    if not (np.isfinite(values) & (values == np.floor(values))).all():
      raise UserError(f'pass@k: {name} must be whole numbers.')
  for bad, why in (
    (n < 1, 'samples must be 1 or more'),
    (c < 0, 'correct must be 0 or more'),
    (c > n, 'correct must not be above samples'),
    (k < 1, 'k must be 1 or more'),
    (k > n, 'k must not be above samples; a law of coverage extrapolates'),
  ):
    if bad.any():
      i = int(np.flatnonzero(bad.ravel())[0])
      counts = f'samples {n.flat[i]:g}, correct {c.flat[i]:g}, k {k.flat[i]:g}'
      raise UserError(f'pass@k: {why} ({counts}).')


def coverage_at(samples, correct, k) -> np.ndarray:
  """Coverage at each k [ks]: the mean of `pass_at_k` over problems [problems]."""
  ks = np.atleast_1d(k)
  return np.array([pass_at_k(samples, correct, attempts).mean() for attempts in ks])


def grid_of_k(most: int) -> np.ndarray:
  """1, 2, 5, 10, 20, 50, ... up to `most`: evenly spread in ln k."""
  decades = 10 ** np.arange(len(str(most)))
  steps = np.outer(decades, (1, 2, 5)).ravel()
  return steps[steps <= most]


@dataclasses.dataclass(frozen=True)
class BetaBinomial:
  """A chance of success for each problem, drawn from Beta(alpha, beta).

  The density near zero decides how coverage grows: -ln coverage falls as k^-alpha for large k
  (Schaeffer et al. 2025, arXiv:2502.17578).
  """

  alpha: float
  beta: float

  def pass_at(self, k) -> np.ndarray:
    """Coverage at k attempts: 1 - B(alpha, beta + k) / B(alpha, beta)."""
    k = np.asarray(k, np.float64)
    return -np.expm1(
      special.betaln(self.alpha, self.beta + k) - special.betaln(self.alpha, self.beta)
    )

  def exponent(self, ks) -> float:
    """b of -ln coverage ~ k^-b over these k."""
    return exponent_of(ks, self.pass_at(ks))


def exponent_of(ks, coverage) -> float:
  """b of -ln coverage = a k^-b; see `power_law`."""
  return power_law(ks, coverage)[1]


def power_law(ks, coverage) -> tuple[float, float]:
  """(a, b) of -ln coverage = a k^-b by least squares in logarithms, without coverages of 0 and 1.

  Raises:
    UserError: fewer than two k have a coverage between 0 and 1.
  """
  ks = np.asarray(ks, np.float64)
  coverage = np.asarray(coverage, np.float64)
  inside = (coverage > 0) & (coverage < 1)
  if inside.sum() < 2:
    raise UserError(
      'An exponent of coverage needs at least two k whose coverage is between 0 and 1.'
    )
  slope, height = np.polyfit(np.log(ks[inside]), np.log(-np.log(coverage[inside])), 1)
  return float(np.exp(height)), float(-slope)


def fit_beta_binomial(samples, correct, start: BetaBinomial | None = None) -> BetaBinomial:
  """The beta-binomial distribution of maximum likelihood.

  Args:
    samples, correct: n and c of each problem [problems].
    start: where the search starts, to a coarser tolerance, as in a bootstrap; None to start at two places.

  Raises:
    UserError: all problems were solved in the same share of their attempts, which no distribution explains.
  """
  n, c = (np.asarray(values, np.float64) for values in (samples, correct))
  _check_counts(n, c, np.ones_like(n))
  rates = c / n
  if np.ptp(rates) == 0:
    raise UserError(
      f'Every problem was solved in {rates[0]:.3g} of its attempts: a beta-binomial needs problems that differ.'
    )

  def surprise(z) -> float:
    return -stats.betabinom.logpmf(c, n, *np.exp(z)).sum()

  # z is (ln alpha, ln beta). Nelder-Mead needs no gradient of gamma functions, and takes milliseconds for two
  # parameters.
  starts = [(-1.0, 1.0), (-2.0, 4.0)]
  tolerance = 1e-9
  if start is not None:
    starts = [np.log([start.alpha, start.beta])]
    tolerance = 1e-4
  options = {'xatol': tolerance, 'fatol': tolerance, 'maxiter': 4000}
  ends = [optimize.minimize(surprise, z, method='Nelder-Mead', options=options) for z in starts]
  best = min(ends, key=operator.attrgetter('fun'))
  return BetaBinomial(*(float(value) for value in np.exp(best.x)))
