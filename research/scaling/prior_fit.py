"""A law of N and D with priors: the maximum a posteriori, with errors from the curvature there (Laplace).

The law is GammaChinchilla, L = E + (A / N^alpha + B / D^beta)^gamma. It is written around the geometric means
of the data, with the exponents p = alpha gamma and q = beta gamma of the two terms when each stands alone. A
few runs do not determine gamma, and hardly E. Priors learned from other sweeps keep these near the values of
other sweeps, and give way to rows that say otherwise.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import stats

NAMES = ('ln_E', 'ln_A', 'ln_B', 'ln_p', 'ln_q', 'ln_gamma')
# Degrees of freedom of the Student t of the rows' scatter and of a forecast's error. Sweeps have diverged runs,
# for which a normal distribution has no room.
FREEDOM = 4.0
# Rows that scatter less than this in ln L show no misfit of the law, so that none is expected beyond them. It
# is a third of the smallest scatter of any public sweep.
EXACT = 3e-4
# Bounds of theta, which keep a trial step finite.
LOW = (-12.0, -25.0, -25.0, -6.0, -6.0, -2.5)
HIGH = (6.0, 12.0, 12.0, 1.5, 1.5, 2.5)


@dataclasses.dataclass(frozen=True)
class Prior:
  """Normal priors of ln E (nats), ln p, ln q and ln gamma, and the error of the law beyond the rows.

  Attributes:
    mean, deviation: of the four.
    drift: the scale of the error of ln L for each e-fold of C beyond the largest fitted, in proportion less
      where the rows scatter by less than EXACT.
    recency: the weight of a row is (C / largest C)^recency, since the law is least wrong near the forecast.
  """

  mean: tuple[float, float, float, float]
  deviation: tuple[float, float, float, float]
  drift: float = 0.0
  recency: float = 0.0


class Point(NamedTuple):
  """ln L [rows] and its derivatives by theta [rows, 6]."""

  value: np.ndarray
  slopes: np.ndarray


def evaluate(theta: np.ndarray, x: np.ndarray, z: np.ndarray) -> Point:
  """ln L and its derivatives.

  Args:
    theta: coordinates in the order of NAMES [6].
    x, z: ln N and ln D less their means in the data, [rows] each.
  """
  floor = np.exp(theta[0])
  p, q, gamma = np.exp(theta[3:])
  u = (theta[1] - p * x) / gamma
  v = (theta[2] - q * z) / gamma
  # ln(e^u + e^v) and the shares of both terms, without overflow.
  top = np.maximum(u, v)
  first = np.exp(u - top)
  second = np.exp(v - top)
  total = first + second
  first = first / total
  second = second / total
  log_sum = top + np.log(total)
  # The bound is far above any loss; it keeps a wild trial step finite.
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
  """The posterior of theta, as a normal distribution, and what a forecast needs.

  Attributes:
    theta, covariance: in the order of NAMES, [6] and [6, 6].
    scatter: the scale of the Student t of ln L from run to run.
    center: the means of ln N and ln D.
    largest: the largest C of the rows.
    rows: how many there are.
  """

  theta: np.ndarray
  covariance: np.ndarray
  scatter: float
  center: tuple[float, float]
  largest: float
  rows: int
  prior: Prior

  def predict(self, params, tokens, flops=None) -> tuple[np.ndarray, np.ndarray]:
    """(ln L, the scale of its error for one new run) at each (N, D); `flops` is 6 N D by default."""
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
    """theta drawn from the normal approximation of the posterior, [count, 6]."""
    return np.random.default_rng(seed).multivariate_normal(self.theta, self.covariance, count)

  def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
    """GammaChinchilla's parameters for theta [..., 6]."""
    p, q, gamma = (np.exp(theta[..., i]) for i in (3, 4, 5))
    alpha = p / gamma
    beta = q / gamma
    return {
      'E': np.exp(theta[..., 0]),
      'A': np.exp(theta[..., 1] / gamma + alpha * self.center[0]),
      'B': np.exp(theta[..., 2] / gamma + beta * self.center[1]),
      'alpha': alpha,
      'beta': beta,
      'gamma': gamma,
    }


def fit(params, tokens, loss, prior: Prior, flops=None, rounds: int = 400) -> PriorFit:
  """The maximum a posteriori, by damped Gauss-Newton steps from nine starts.

  Args:
    params, tokens, loss: of the rows, [rows] each; loss in nats.
    flops: C of the rows [rows], for their weights and the reach of a forecast; 6 N D by default.
    rounds: the most steps from each start.
  """
  ln_n = np.log(params)
  ln_d = np.log(tokens)
  y = np.log(loss)
  center = float(ln_n.mean()), float(ln_d.mean())
  x = ln_n - center[0]
  z = ln_d - center[1]
  c = 6 * params * tokens if flops is None else np.asarray(flops, np.float64)
  counts = (c / c.max()) ** prior.recency
  best = None
  middle = float(np.exp(y.mean()))
  lowest = float(np.exp(y.min()))
  # The posterior may have a minimum with a high floor and one with a low floor, and the same for gamma.
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
  """(mean, precision) of all six coordinates."""
  mean = np.zeros(6)
  precision = np.zeros(6)
  constrained = [NAMES.index(name) for name in ('ln_E', 'ln_p', 'ln_q', 'ln_gamma')]
  mean[constrained] = prior.mean
  precision[constrained] = 1 / np.square(prior.deviation)
  # The sizes of the two terms have no prior; a little precision keeps the matrix invertible.
  precision[1:3] = 1e-6
  return mean, precision


def _descend(theta, x, z, y, counts, prior: Prior, rounds: int):
  """(minus log posterior, theta, covariance, scatter) at the end of the steps from one start.

  A step is Gauss-Newton's with the weights of the Student t at the last residuals; every fourth step the
  scatter follows. Together they are the EM algorithm for a Student t (Lange et al. 1989).
  """
  mean, precision = _prior_rows(prior)
  point = evaluate(theta, x, z)
  residual = point.value - y
  scatter = max(1.4826 * float(np.median(np.abs(residual))), 1e-5)
  damping = 1e-2
  value = np.inf
  for step in range(rounds):
    if step % 4 == 0:
      scatter = _scatter(residual, scatter, counts)
      before = value
      value = _objective(theta, residual, scatter, counts, mean, precision)
      if abs(before - value) < 1e-9 * (1 + abs(value)):
        break
    weight = _student_weights(residual, scatter, counts) / scatter**2
    matrix = (point.slopes * weight[:, None]).T @ point.slopes + np.diag(precision)
    gradient = point.slopes.T @ (weight * residual) + precision * (theta - mean)
    move = -np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient)
    trial = np.clip(theta + np.clip(move, -1.0, 1.0), LOW, HIGH)
    trial_point = evaluate(trial, x, z)
    trial_residual = trial_point.value - y
    trial_value = _objective(trial, trial_residual, scatter, counts, mean, precision)
    if trial_value < value:
      theta, point, residual, value = trial, trial_point, trial_residual, trial_value
      damping = max(damping / 5, 1e-9)
    else:
      damping = min(damping * 6, 1e6)
  weight = _student_weights(residual, scatter, counts) / scatter**2
  matrix = (point.slopes * weight[:, None]).T @ point.slopes + np.diag(precision)
  return value, theta, np.linalg.inv(matrix), scatter


def _student_weights(residual, scatter: float, counts) -> np.ndarray:
  """The weight of each row in a least-squares step [rows]: small for a residual far beyond the scatter."""
  return counts * (FREEDOM + 1) / (FREEDOM + (residual / scatter) ** 2)


def _scatter(residual, scatter: float, counts) -> float:
  """The scale of the residuals after three EM steps."""
  # The rows less about 5 parameters, which the priors determine in part.
  spare = max(counts.sum() * (1 - 5 / len(residual)), 1)
  for _ in range(3):
    weight = _student_weights(residual, scatter, counts)
    scatter = max(float(np.sqrt((weight * residual**2).sum() / spare)), 1e-6)
  return scatter


def _objective(theta, residual, scatter, counts, mean, precision) -> float:
  """Minus the log posterior, up to a constant."""
  rows = 0.5 * (FREEDOM + 1) * (counts * np.log1p((residual / scatter) ** 2 / FREEDOM)).sum()
  return float(
    rows + counts.sum() * np.log(scatter) + 0.5 * (precision * (theta - mean) ** 2).sum()
  )


# Learned from all the sweeps of experiments/forecasting by `league.py --learn`. The league itself leaves one
# sweep out at a time.
LEARNED = Prior(
  mean=(-0.0400, -1.4473, -1.2764, -0.7365), deviation=(1.2125, 0.4112, 0.5989, 0.4438),
  drift=0.0070, recency=0.75,
)  # fmt: skip
