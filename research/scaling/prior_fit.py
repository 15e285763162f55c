"""A law of N and D with priors on its exponents, its floor and its shape: maximum a posteriori, Laplace errors.

The law is GammaChinchilla, L = E + (A / N^alpha + B / D^beta)^gamma, written around the data's geometric means
with the exponents of the two terms alone, p = alpha gamma and q = beta gamma. A few runs do not tell gamma, and
hardly E; priors learned from other sweeps keep them where sweeps have been, and give way to
rows that say otherwise.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import stats

NAMES = ('ln_E', 'ln_A', 'ln_B', 'ln_p', 'ln_q', 'ln_gamma')
FREEDOM = (
  4.0  # of the Student t of the rows' scatter (diverged runs are there) and of a forecast's error
)
# Rows that follow the law to this scatter of ln L show no misfit, so that none is foreseen beyond them.
# It is a third of the least scatter of any public sweep.
EXACT = 3e-4


@dataclasses.dataclass(frozen=True)
class Prior:
  """Normal priors of ln E (nats), ln p, ln q and ln gamma, and what the law leaves unexplained beyond the rows.

  `drift`: scale of the error of ln L that is added for every e-fold of C beyond the largest fitted, in
  proportion less where the rows scatter by less than EXACT.
  `recency`: a row counts as (C / largest C)^recency: the law is least wrong near what it is to forecast.
  """

  mean: tuple[float, float, float, float]
  deviation: tuple[float, float, float, float]
  drift: float = 0.0
  recency: float = 0.0


class Point(NamedTuple):
  """ln L at places [places], its slopes [places, 6]."""

  value: np.ndarray
  slopes: np.ndarray


def evaluate(theta: np.ndarray, x: np.ndarray, z: np.ndarray) -> Point:
  """ln L and its derivatives; x and z are ln N and ln D less their means in the data."""
  floor, p, q, gamma = np.exp(theta[0]), *np.exp(theta[3:])
  u, v = (theta[1] - p * x) / gamma, (theta[2] - q * z) / gamma
  top = np.maximum(u, v)
  first, second = np.exp(u - top), np.exp(v - top)
  total = first + second
  first, second, log_sum = first / total, second / total, top + np.log(total)
  reducible = np.exp(np.minimum(gamma * log_sum, 50.0))
  loss = floor + reducible
  share = reducible / loss
  slopes = np.stack(
    [
      floor / loss,
      share * first,
      share * second,
      -share * first * p * x,
      -share * second * q * z,
      share * gamma * (log_sum - first * u - second * v),
    ],
    axis=-1,
  )
  return Point(np.log(loss), slopes)


@dataclasses.dataclass(frozen=True)
class PriorFit:
  """What the rows and the priors say. `theta` [6], `covariance` [6, 6] of NAMES.

  `scatter`: the scale of a run's own scatter of ln L.
  """

  theta: np.ndarray
  covariance: np.ndarray
  scatter: float
  center: tuple[float, float]
  largest: float
  rows: int
  prior: Prior

  def predict(self, params, tokens, flops=None) -> tuple[np.ndarray, np.ndarray]:
    """(ln L, the scale of its error for one new run) at places; `flops` is 6 N D by default."""
    params, tokens = (np.atleast_1d(np.asarray(v, np.float64)) for v in (params, tokens))
    flops = 6 * params * tokens if flops is None else np.asarray(flops, np.float64)
    point = evaluate(self.theta, np.log(params) - self.center[0], np.log(tokens) - self.center[1])
    variance = np.einsum('ni,ij,nj->n', point.slopes, self.covariance, point.slopes)
    reach = np.maximum(np.log(flops / self.largest), 0.0)
    drift = self.prior.drift * min(self.scatter / EXACT, 1.0)
    return point.value, np.sqrt(variance + self.scatter**2 + (drift * reach) ** 2)

  def interval(self, params, tokens, level: float, flops=None) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the loss of one new run: Student's t of FREEDOM degrees around the forecast."""
    middle, deviation = self.predict(params, tokens, flops)
    half = stats.t.ppf((1 + level) / 2, FREEDOM) * deviation
    return np.exp(middle - half), np.exp(middle + half)

  def draws(self, count: int = 400, seed: int = 0) -> np.ndarray:
    """theta from the posterior's normal approximation, [count, 6]."""
    return np.random.default_rng(seed).multivariate_normal(self.theta, self.covariance, count)

  def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
    """GammaChinchilla's parameters of theta [..., 6]."""
    p, q, gamma = (np.exp(theta[..., i]) for i in (3, 4, 5))
    alpha, beta = p / gamma, q / gamma
    return {
      'E': np.exp(theta[..., 0]),
      'A': np.exp(theta[..., 1] / gamma + alpha * self.center[0]),
      'B': np.exp(theta[..., 2] / gamma + beta * self.center[1]),
      'alpha': alpha,
      'beta': beta,
      'gamma': gamma,
    }


def fit(params, tokens, loss, prior: Prior, flops=None, rounds: int = 400) -> PriorFit:
  """The maximum a posteriori by damped Gauss-Newton steps from several starts; scatter by iterated reweighting.

  Args:
    params, tokens, loss: rows, [rows] each; loss in nats.
    flops: C of the rows, for how far a forecast reaches; 6 N D by default.
  """
  n, d, y = np.log(params), np.log(tokens), np.log(loss)
  center = float(n.mean()), float(d.mean())
  x, z = n - center[0], d - center[1]
  c = 6 * params * tokens if flops is None else np.asarray(flops, np.float64)
  counts = (c / c.max()) ** prior.recency
  best = None
  middle, lowest = float(np.exp(y.mean())), float(np.exp(y.min()))
  for share in (0.3, 0.6, 0.9):
    for gamma in (-0.7, 0.0, 0.7):
      floor = min(share * lowest, np.exp(prior.mean[0] + 2 * prior.deviation[0]))
      half = np.log(max(middle - floor, 1e-3 * middle) / 2)
      start = np.array([np.log(floor), half, half, prior.mean[1], prior.mean[2], gamma])
      end = _descend(start, x, z, y, counts, prior, rounds)
      if best is None or end[0] < best[0]:
        best = end
  _, theta, covariance, scatter = best
  return PriorFit(theta, covariance, scatter, center, float(c.max()), len(y), prior)


def _prior_rows(prior: Prior) -> tuple[np.ndarray, np.ndarray]:
  """(mean, precision) of all six coordinates; the sizes of the two terms are free."""
  mean, precision = np.zeros(6), np.zeros(6)
  for i, m, s in zip((0, 3, 4, 5), prior.mean, prior.deviation, strict=True):
    mean[i], precision[i] = m, 1 / s**2
  precision[1:3] = 1e-6
  return mean, precision


def _descend(theta, x, z, y, counts, prior: Prior, rounds: int):
  """(minus log posterior, theta, covariance, scatter)."""
  mean, precision = _prior_rows(prior)
  rows = len(y)
  point = evaluate(theta, x, z)
  residual = point.value - y
  scatter = max(1.4826 * float(np.median(np.abs(residual))), 1e-5)
  damping, value = 1e-2, np.inf
  for step in range(rounds):
    if step % 4 == 0:  # the scatter follows the fit, as EM for a Student t has it
      for _ in range(3):
        weight = counts * (FREEDOM + 1) / (FREEDOM + (residual / scatter) ** 2)
        spare = max(counts.sum() * (1 - 5 / rows), 1)
        scatter = max(float(np.sqrt((weight * residual**2).sum() / spare)), 1e-6)
      before, value = value, _objective(theta, residual, scatter, counts, mean, precision)
      if abs(before - value) < 1e-9 * (1 + abs(value)):
        break
    weight = counts * (FREEDOM + 1) / (FREEDOM + (residual / scatter) ** 2) / scatter**2
    matrix = (point.slopes * weight[:, None]).T @ point.slopes + np.diag(precision)
    gradient = point.slopes.T @ (weight * residual) + precision * (theta - mean)
    move = -np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient)
    trial = theta + np.clip(move, -1.0, 1.0)
    trial = np.clip(trial, [-12, -25, -25, -6, -6, -2.5], [6, 12, 12, 1.5, 1.5, 2.5])
    other = evaluate(trial, x, z)
    trial_value = _objective(trial, other.value - y, scatter, counts, mean, precision)
    if trial_value < value:
      theta, point, residual, value = trial, other, other.value - y, trial_value
      damping = max(damping / 5, 1e-9)
    else:
      damping = min(damping * 6, 1e6)
  weight = counts * (FREEDOM + 1) / (FREEDOM + (residual / scatter) ** 2) / scatter**2
  matrix = (point.slopes * weight[:, None]).T @ point.slopes + np.diag(precision)
  return value, theta, np.linalg.inv(matrix), scatter


def _objective(theta, residual, scatter, counts, mean, precision) -> float:
  rows = 0.5 * (FREEDOM + 1) * (counts * np.log1p((residual / scatter) ** 2 / FREEDOM)).sum()
  return float(
    rows + counts.sum() * np.log(scatter) + 0.5 * (precision * (theta - mean) ** 2).sum()
  )


# From all the sources of experiments/forecasting by `league.py --learn`; the league itself leaves one out.
LEARNED = Prior(
  mean=(-0.0400, -1.4473, -1.2764, -0.7365), deviation=(1.2125, 0.4112, 0.5989, 0.4438),
  drift=0.0070, recency=0.75,
)  # fmt: skip
