"""Made-up sweeps: how often intervals hold the truth, and what another count of N makes of an exponent."""

from collections.abc import Mapping

import jax
import numpy as np

from research.scaling import bootstrap, law_fit, objective
from research.scaling.laws.base import Law, precise


def exponent_by_count(law: Law, values, sizes, counted, flops, tokens) -> float:
  """The exponent a of N* ~ C^a that a study sees that counts other parameters than the law's.

  Every size N of `sizes` (counted the study's way) is trained once and evaluated at `tokens`; its loss is
  law(`counted`(N), D). At each C of `flops` that size wins whose evaluation nearest to D = C / (6 N) is lowest;
  the slope of ln N on ln C is what approach 1 reports. With N non-embedding and counted(N) =
  N + 47491 N^(1/3) total parameters, this is how Pearce & Song 2024 (arXiv:2406.12907) reconcile Kaplan's
  exponent with Chinchilla's.
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
  """How often residual-bootstrap intervals of made-up sweeps hold the parameters that made them.

  Each replication draws noise of standard deviation `noise` on the law's own values (log-normal, or normal
  where residuals='linear'), fits from the true values and bootstraps as `bootstrap.bootstrap` does; all of it
  is two queues of the solver. Returns parameter -> share of the `replications` intervals that hold it.
  """
  rng = np.random.default_rng(seed)
  robust, residuals = robust or law.robust, residuals or law.residuals
  problem = objective.Problem(law, robust, residuals)
  data, clean = law_fit.make_data(law, inputs, law(values, **inputs))
  target = np.log(clean) if residuals == 'log' else clean
  n, p = len(clean), len(problem.free)
  y = target + noise * rng.normal(size=(replications, n))
  start = law.coordinates({k: np.float64(v) for k, v in values.items()}, data['center'])
  start = np.tile([start[name] for name in problem.free], (replications, 1))
  ones, pair = np.ones((1, n)), lambda count: np.stack([np.arange(count), np.zeros(count, int)], 1)
  solution = law_fit.minimise(problem, data, start, y, ones, pair(replications), delta, 0.5)
  with precise():
    fitted = np.array(jax.vmap(lambda z: problem.predict(z, data))(solution.z))
  fitted = np.log(fitted) if residuals == 'log' else fitted
  spread = (y - fitted) * np.sqrt(n / (n - p))
  drawn = rng.integers(n, size=(replications, replicates, n))
  redrawn = fitted[:, None] + np.take_along_axis(spread[:, None], drawn, axis=2)
  fits = replications * replicates
  ends = law_fit.minimise(
    problem,
    data,
    np.repeat(solution.z, replicates, axis=0),
    redrawn.reshape(fits, n),
    ones,
    pair(fits),
    delta,
    0.5,
  )
  sampled = problem.values(ends.z.T, data['center'], np.exp)
  shares = {}
  for name, truth in values.items():
    samples = sampled[name].reshape(replications, replicates).T
    low, high = bootstrap.interval(samples, level, n - p)
    shares[name] = float(((low <= truth) & (truth <= high)).mean())
  return shares
