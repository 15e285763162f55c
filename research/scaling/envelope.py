"""Approach 1 of Hoffmann et al. 2022: the envelope of training curves."""

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

  `curves`: run -> [points, 2] of (tokens, loss); `params`: run -> N. The first `skip` fraction of each curve
  (warm-up) does not count. Only budgets that at least two runs reach are used, and only where the lowest
  run is neither the smallest nor the largest there. Meaningful for runs whose learning rate does not
  decay towards the end (constant or warm-up-stable): under a cosine, only a curve's last point is a fair one.
  """
  runs = sorted(curves, key=lambda run: params[run])
  lines = []
  for run in runs:
    points = np.asarray(curves[run], np.float64)
    points = points[np.isfinite(points).all(1) & (points[:, 0] > skip * points[:, 0].max())]
    lines.append((np.log(cost.flops(params[run], points[:, 0])), points[:, 1]))
  lines = [
    line if len(line[0]) > 1 else (np.array([np.nan, np.nan]), np.full(2, np.nan)) for line in lines
  ]
  reach = [x[0] for x, _ in lines], [x[-1] for x, _ in lines]
  grid = np.linspace(np.nanmin(reach[0]), np.nanmax(reach[1]), budgets)
  table = np.stack([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in lines])
  alive = np.isfinite(table)
  count = alive.sum(0)
  table = np.where(alive, table, np.inf)
  best = table.argmin(0)
  sizes = np.array([params[run] for run in runs])
  at = np.arange(budgets)
  first = alive.argmax(0)
  last = len(runs) - 1 - alive[::-1].argmax(0)
  inside = (count >= 2) & (best != first) & (best != last)
  if len(np.unique(sizes[best[inside]])) < 2:
    raise NoAllocation(
      'The envelope of the training curves passes through fewer than two sizes that are neither '
      'the smallest nor the largest at their budget: approach 1 needs more sizes.'
    )
  c, n = np.exp(grid[inside]), sizes[best[inside]]
  d = cost.tokens(n, c)
  lowest = Profile(np.nan, n, d, table[best, at][inside], 'envelope')
  return Allocation(
    1,
    'envelope',
    power_law(c, n),
    power_law(c, d),
    power_law(c, lowest.loss),
    (lowest,),
    np.full((1, 6), np.nan),
  )
