"""Simulated sweeps: how often intervals cover the truth, and what another count of N does to an exponent."""

from collections.abc import Mapping

import jax
import numpy as np

from research.scaling import bootstrap, law_fit, objective
from research.scaling.laws.base import Law, precise


def exponent_by_count(law: Law, values, sizes, counted, flops, tokens) -> float:
  """The exponent a of N* ~ C^a of a study that counts other parameters than the law does.

  Each size N is trained once and evaluated along the way; its loss is law(counted(N), D). At each C the size
  wins whose evaluation nearest to D = C / (6 N) is lowest, and the slope of ln N on ln C is what approach 1
  reports. With N without embeddings and counted(N) = N + 47491 N^(1/3), the total, this is how Pearce & Song
  2024 (arXiv:2406.12907) reconcile Kaplan's exponent with Chinchilla's.

  Args:
    law, values: the true law and its parameters.
    sizes: N of each model as the study counts it [sizes].
    counted: a function from the study's N to the law's.
    flops: the budgets C [budgets].
    tokens: the D at which a model is evaluated [evaluations].
  """
  sizes, flops, tokens = (np.asarray(v, np.float64) for v in (sizes, flops, tokens))
  loss = law(values, params=np.asarray(counted(sizes))[:, None], tokens=tokens)
  nearest = np.abs(6 * sizes[:, None, None] * tokens - flops[:, None]).argmin(-1)
  best = np.take_along_axis(loss, nearest, axis=1).argmin(0)
  return float(np.polyfit(np.log(flops), np.log(sizes[best]), 1)[0])


def coverage(
  law: Law,
  values: Mapping[str, float],
  inputs: Mapping[str, np.ndarray],
  *,
  noise: float,
  replications: int = 200,
  replicates: int = 200,
  level: float = 0.9,
  robust: str | None = None,
  delta: float = 1e-3,
  residuals: str | None = None,
  seed: int = 0,
) -> dict[str, float]:
  """How often residual-bootstrap intervals of simulated sweeps cover the parameters that made them.

  Each replication adds noise to the law's values, fits from the true parameters and bootstraps as
  `bootstrap.bootstrap` does. All of it is two queues of the solver.

  Args:
    law, values: the true law and its parameters.
    inputs: of the rows of a sweep, an array [rows] each.
    noise: its standard deviation, in ln output, or in the output's unit where residuals are 'linear'.
    replications: simulated sweeps. replicates: of each sweep's bootstrap.
    level: of the intervals.
    robust, delta, residuals: as in `law_fit.fit`.

  Returns:
    For each parameter the share of the `replications` intervals that cover it.
  """
  rng = np.random.default_rng(seed)
  robust = robust or law.robust
  residuals = residuals or law.residuals
  problem = objective.Problem(law, robust, residuals)
  data, clean = law_fit.make_data(law, inputs, law(values, **inputs))
  target = np.log(clean) if residuals == 'log' else clean
  n, p = len(clean), len(problem.free)
  y = target + noise * rng.normal(size=(replications, n))
  start = law.coordinates({k: np.float64(v) for k, v in values.items()}, data['center'])
  start = np.tile([start[name] for name in problem.free], (replications, 1))
  solution = _fit_each(problem, data, start, y, delta)

  def predict(z):
    return problem.predict(z, data)

  with precise():
    fitted = np.array(jax.vmap(predict)(solution.z))
  fitted = np.log(fitted) if residuals == 'log' else fitted
  # As in `bootstrap.bootstrap`: residuals are smaller than the noise by the p parameters that took part of it.
  spread = (y - fitted) * np.sqrt(n / (n - p))
  drawn = rng.integers(n, size=(replications, replicates, n))
  redrawn = fitted[:, None] + np.take_along_axis(spread[:, None], drawn, axis=2)
  start = np.repeat(solution.z, replicates, axis=0)
  ends = _fit_each(problem, data, start, redrawn.reshape(-1, n), delta)
  # [replications * replicates] values of each parameter, those of a simulated sweep side by side.
  sampled = problem.values(ends.z.T, data['center'], np.exp)
  shares = {}
  for name, truth in values.items():
    samples = sampled[name].reshape(replications, replicates).T
    low, high = bootstrap.interval(samples, level, n - p)
    shares[name] = float(((low <= truth) & (truth <= high)).mean())
  return shares


def _fit_each(problem, data, z0, y, delta):
  """A fit of each target y [problems, rows] from its own start z0 [problems, free], with equal weights."""
  problems, n = y.shape
  rows = np.stack([np.arange(problems), np.zeros(problems, int)], axis=1)
  return law_fit.minimise(problem, data, z0, y, np.ones((1, n)), rows, delta, 0.5)
