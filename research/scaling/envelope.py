"""Approach 1 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.1): the envelope of training curves."""

from collections.abc import Mapping

import numpy as np

from research.scaling.allocation import Allocation, NoAllocation, Profile, power_law
from research.scaling.cost import SIX_ND, Cost


def envelope(
  curves: Mapping[str, np.ndarray],
  params: Mapping[str, float],
  cost: Cost = SIX_ND,
  *,
  budgets: int = 1500,
  skip: float = 0.0,
) -> Allocation:
  """Approach 1: at each of `budgets` values of C, the run whose training curve is lowest there.

  It uses only budgets that at least two runs reach, and of these only where the lowest run is neither the
  smallest nor the largest. It is meaningful for runs whose learning rate does not decay (constant, or
  warm-up-stable): under a cosine only the last point of a curve is fair.

  Args:
    curves: the training curve of each run, [points, 2] of (tokens, loss in nats).
    params: N of each run.
    cost: C as a function of N and D.
    skip: the fraction of each curve, its warm-up, to leave out.

  Raises:
    NoAllocation: the envelope goes through fewer than two sizes.
  """
  runs = sorted(curves, key=params.get)
  sizes = np.array([params[run] for run in runs])
  lines = [_line(curves[run], params[run], cost, skip) for run in runs]
  lowest_c = np.nanmin([ln_c[0] for ln_c, _ in lines])
  highest_c = np.nanmax([ln_c[-1] for ln_c, _ in lines])
  grid = np.linspace(lowest_c, highest_c, budgets)
  # The loss of every run at every budget [runs, budgets], NaN where a run does not reach it.
  losses = np.stack([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in lines])
  reached = np.isfinite(losses)
  losses = np.where(reached, losses, np.inf)
  best = losses.argmin(0)
  # The smallest and the largest run at a budget may be lowest only because there is none beyond them.
  smallest = reached.argmax(0)
  largest = len(runs) - 1 - reached[::-1].argmax(0)
  inside = (reached.sum(0) >= 2) & (best != smallest) & (best != largest)
  if len(np.unique(sizes[best[inside]])) < 2:
    raise NoAllocation(
      'The envelope of the training curves passes through fewer than two sizes that are neither '
      'the smallest nor the largest at their budget: approach 1 needs more sizes.'
    )
  c = np.exp(grid[inside])
  n = sizes[best[inside]]
  d = cost.tokens(n, c)
  lowest = Profile(np.nan, n, d, losses.min(0)[inside], 'envelope')
  return Allocation(
    approach=1,
    method='envelope',
    params=power_law(c, n),
    tokens=power_law(c, d),
    loss=power_law(c, lowest.loss),
    profiles=(lowest,),
    samples=np.full((1, 6), np.nan),
  )


def _line(curve, params: float, cost: Cost, skip: float) -> tuple[np.ndarray, np.ndarray]:
  """(ln C, loss) of a training curve; NaN where fewer than two of its points count."""
  points = np.asarray(curve, np.float64)
  points = points[np.isfinite(points).all(1) & (points[:, 0] > skip * points[:, 0].max())]
  if len(points) < 2:
    return np.full(2, np.nan), np.full(2, np.nan)
  return np.log(cost.flops(params, points[:, 0])), points[:, 1]
