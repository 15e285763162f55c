"""What to run next: the runs that narrow a forecast the most for their compute."""

import numpy as np

from research.scaling.laws.base import LawError


def next_runs(
  analysis,
  budget: float,
  *,
  target: float | None = None,
  count: int = 3,
  candidates: int = 200,
  seed: int = 0,
) -> list[dict]:
  """The runs, for at most `budget` FLOPs in all, that would narrow the forecast at `target` FLOPs the most.

  Greedy D-optimal-style design for one number: each candidate run's worth is the fall in the variance of
  ln L*(target) that one more observation at its (N, D) brings, by the bootstrap's joint spread of the two
  (a linear-Gaussian update), per run that fits the remaining budget. `target` defaults to 10 times the
  largest fitted budget.
  """
  if analysis.approach3 is None:
    raise LawError('next_runs needs a fitted law (approach 3).')
  target = 10 * float(analysis.rows.flops.max()) if target is None else float(target)
  rng = np.random.default_rng(seed)
  low = np.log(analysis.rows.flops.min())
  high = np.log(min(budget, target))
  if high <= low:
    raise LawError(f'A budget of {budget:.3g} FLOPs is below the smallest run of the sweep.')
  c = np.exp(rng.uniform(low, high, candidates))
  best, _, _ = analysis.optimum(c)
  n = best * np.exp(rng.uniform(np.log(0.2), np.log(5.0), candidates))
  d = analysis.cost.tokens(n, c)
  values = {k: v[:, None] for k, v in analysis.bootstrap.parameters.items()}
  ln_loss = np.log(analysis.approach3.law(values, params=n, tokens=d))
  goal = np.log(analysis.optimum_samples(target).loss[:, 0])
  noise = float(np.var(analysis.bootstrap.spread)) + 1e-12
  ln_loss, goal = ln_loss - ln_loss.mean(0), goal - goal.mean()
  before, remaining, chosen = float(goal.var()), float(budget), []
  for _ in range(count):
    covariance = ln_loss.T @ goal / len(goal)
    gain = covariance**2 / (ln_loss.var(0) + noise)
    gain = np.where(c <= remaining, gain, -np.inf)
    k = int(np.argmax(gain))
    if not np.isfinite(gain[k]):
      break
    # What one noisy look at candidate k leaves of everything else.
    slope = ln_loss[:, k] / (ln_loss[:, k].var() + noise)
    shrink = 1 - np.sqrt(noise / (ln_loss[:, k].var() + noise))
    weight = shrink / max(1 - noise / (ln_loss[:, k].var() + noise), 1e-12)
    goal = goal - weight * slope * covariance[k]
    ln_loss = ln_loss - weight * np.outer(slope, ln_loss[:, k] @ ln_loss / len(goal))
    remaining -= c[k]
    after = float(goal.var())
    chosen.append({'flops': c[k], 'params': n[k], 'tokens': d[k], 'variance left': after / before})
  return [{k: float(v) for k, v in run.items()} for run in chosen]
