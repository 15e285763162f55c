"""The next runs to do: those that narrow a forecast the most within a budget."""

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
  """The runs that would narrow the forecast at `target` FLOPs the most, for at most `budget` FLOPs in all.

  It is a greedy optimal design for one number, ln L*(target). The gain of a candidate run is the fall of that
  number's variance by one more observation at its N and D. The bootstrap gives the covariance of the two, and
  the update is that of a linear model with normal errors. Each round takes the best candidate within the
  budget.

  Args:
    analysis: with a fitted law.
    budget: FLOPs of all runs together.
    target: FLOPs of the forecast; None for 10 times the largest fitted budget.
    count: the most runs.
    candidates: how many (N, D) to try, at random around the optimum.

  Returns:
    A dict for each run, best first: flops, params, tokens, and 'variance left', the share of the variance of
    ln L*(target) that remains with this run and those before it.

  Raises:
    LawError: no law was fitted, or the budget is below the smallest run of the sweep.
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
  # Candidates off the optimum too: they tell the two terms of a law apart, which runs along it do not.
  n = best * np.exp(rng.uniform(np.log(0.2), np.log(5.0), candidates))
  d = analysis.cost.tokens(n, c)
  values = {k: v[:, None] for k, v in analysis.bootstrap.parameters.items()}
  ln_loss = np.log(analysis.approach3.law(values, params=n, tokens=d))
  goal = np.log(analysis.optimum_samples(target).loss[:, 0])
  noise = float(np.var(analysis.bootstrap.spread)) + 1e-12
  # Deviations over the bootstrap: [replicates, candidates] and [replicates].
  ln_loss = ln_loss - ln_loss.mean(0)
  goal = goal - goal.mean()
  variance_before = float(goal.var())
  remaining = float(budget)
  chosen = []
  for _ in range(count):
    covariance = ln_loss.T @ goal / len(goal)
    gain = covariance**2 / (ln_loss.var(0) + noise)
    gain = np.where(c <= remaining, gain, -np.inf)
    k = int(np.argmax(gain))
    if not np.isfinite(gain[k]):
      break
    # The deviations that remain after one noisy observation of candidate k, by a Kalman update in its
    # square-root form (Whitaker & Hamill 2002), which gives the replicates the right covariance.
    slope = ln_loss[:, k] / (ln_loss[:, k].var() + noise)
    shrink = 1 - np.sqrt(noise / (ln_loss[:, k].var() + noise))
    weight = shrink / max(1 - noise / (ln_loss[:, k].var() + noise), 1e-12)
    goal = goal - weight * slope * covariance[k]
    ln_loss = ln_loss - weight * np.outer(slope, ln_loss[:, k] @ ln_loss / len(goal))
    remaining -= c[k]
    share = float(goal.var()) / variance_before
    chosen.append({'flops': c[k], 'params': n[k], 'tokens': d[k], 'variance left': share})
  return [{name: float(value) for name, value in run.items()} for run in chosen]
