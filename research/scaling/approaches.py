"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2): the minima of isoFLOP profiles.

Approach 1 is in `envelope`. Approach 3, the parametric fit, is `law_fit.fit` with a law of N and D.
"""

import collections
import dataclasses

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from research.core.errors import did_you_mean
from research.scaling.allocation import (
  DEGREE,
  Allocation,
  NoAllocation,
  Profile,
  interpolant,
  power_law,
)
from research.scaling.cost import SIX_ND, Cost
from research.scaling.rows import Observations, budget_groups

METHODS = ('parabola', 'cubic', 'akima')
FEWEST_SIZES = {'parabola': 3, 'cubic': 4, 'akima': 5}


def profile(flops, params, tokens, loss, cost: Cost, method='parabola', window=None) -> Profile:
  """One isoFLOP curve and its minimum, or the reason why it is refused.

  A curve is refused when it has fewer than 3 sizes (4 for a cubic, 5 for Akima), when the lowest loss is at the
  largest or the smallest size, when it is concave, or when the fitted minimum lies outside the sizes that were
  run.

  Args:
    flops: the budget C.
    params, tokens, loss: of the runs [runs]; seeds of one size become their mean.
    window: take only sizes within this factor of the lowest point's; None for all.
  """
  order = np.argsort(params, kind='stable')
  params, tokens, loss = (np.asarray(v, np.float64)[order] for v in (params, tokens, loss))
  params, tokens, loss = _merge(params, tokens, loss)
  if window is not None and len(loss):
    # A size exactly at the edge of the window counts, whatever the rounding.
    near = np.abs(np.log(params / params[np.argmin(loss)])) <= np.log(window) + 1e-9
    params, tokens, loss = params[near], tokens[near], loss[near]
  base = Profile(float(flops), params, tokens, loss, method)
  if len(params) < FEWEST_SIZES[method]:
    count = '1 size' if len(params) == 1 else f'{len(params)} sizes'
    return dataclasses.replace(base, refused=f'{count}; a {method} needs {FEWEST_SIZES[method]}')
  # A curve that is lowest at an edge may have its minimum anywhere beyond.
  lowest = int(np.argmin(loss))
  if lowest in (0, len(loss) - 1):
    end = 'smallest' if lowest == 0 else 'largest'
    more = 'smaller' if lowest == 0 else 'larger'
    why = f'the lowest loss is at the {end} size: not bracketed, add {more} models'
    return dataclasses.replace(base, refused=why)
  ln_n = np.log(params)
  ln_n_opt, value, why = _minimum(ln_n, loss, method)
  if why:
    return dataclasses.replace(base, refused=why)
  n = float(np.exp(ln_n_opt))
  warnings = [] if len(params) > 3 else ['3 sizes: no check of the shape']
  # Akima's curve goes through every point, and so through the noise; a polynomial averages over it.
  if method == 'akima' and (np.diff(np.sign(np.diff(loss))) < 0).any():
    warnings.append('more than one local minimum: the runs are noisy')
  return dataclasses.replace(
    base,
    params_opt=n,
    tokens_opt=float(cost.tokens(n, flops)),
    loss_opt=float(value),
    warnings=tuple(warnings),
  )


def _merge(params, tokens, loss):
  """(params, tokens, loss) with one entry for each size: the means over its seeds."""
  sizes, index = np.unique(params, return_inverse=True)
  count = np.bincount(index)
  mean_tokens = np.bincount(index, weights=tokens) / count
  mean_loss = np.bincount(index, weights=loss) / count
  return sizes, mean_tokens, mean_loss


def _minimum(ln_n, loss, method) -> tuple[float, float, str | None]:
  """(ln N*, loss*, None), or (NaN, NaN, why there is no minimum)."""
  curve = interpolant(ln_n, loss, method)
  if method == 'parabola':
    center = ln_n.mean()
    a, b, _ = np.polyfit(ln_n - center, loss, 2)
    if a <= 0:
      return np.nan, np.nan, 'the profile is concave: loss does not rise on both sides of a minimum'
    ln_n_opt = center - b / (2 * a)
    if not ln_n[0] < ln_n_opt < ln_n[-1]:
      return np.nan, np.nan, 'the parabola has its minimum outside the sizes that were run'
    return ln_n_opt, float(curve(ln_n_opt)), None
  grid = np.linspace(ln_n[0], ln_n[-1], 4001)
  values = curve(grid)
  k = int(np.argmin(values))
  if k in (0, len(grid) - 1):
    return np.nan, np.nan, f'the {method} profile has no minimum inside the sizes that were run'
  # The vertex of the parabola through the lowest point of the grid and its neighbours.
  a, b, _ = np.polyfit(grid[k - 1 : k + 2] - grid[k], values[k - 1 : k + 2], 2)
  ln_n_opt = grid[k] - (b / (2 * a) if a > 0 else 0.0)
  return float(ln_n_opt), float(curve(ln_n_opt)), None


def isoflop(
  rows: Observations,
  cost: Cost = SIX_ND,
  *,
  method: str = 'parabola',
  window: float | None = None,
  noise: float | None = None,
  floor: float = 0.0,
  replicates: int = 1000,
  seed: int = 0,
) -> Allocation:
  """Approach 2: the minimum of each budget's profile, then N* = k C^a and D* = k C^b, and L* = floor + k C^-c.

  Without `noise` all optima have the same weight. Intervals come from the residuals about the profiles, pooled
  over budgets; Akima's curve leaves none, so that they are about parabolas there.

  With `noise` it is the procedure of Porian et al. 2024 (arXiv:2406.19146, appendix). Each optimum is the
  median over noisy copies of its curve. Its weight is the inverse of its variance, whose root is at least a
  third of the spacing of sizes. A curve is refused if most of its copies have no minimum inside.

  Args:
    cost: C as a function of N and D.
    method: the interpolation of a profile, one of `METHODS`.
    window: as in `profile`.
    noise: the standard deviation of the loss between seeds, in nats; None where it is unknown.
    floor: the irreducible loss in nats where it is known: a few budgets do not determine it.
    replicates: of the bootstrap.

  Raises:
    NoAllocation: fewer than two budgets have a minimum, a minimum lies below the floor, few rows share a
      budget, or the method is unknown.
  """
  if method not in METHODS:
    raise NoAllocation(
      f'method {method!r} is not one of {", ".join(METHODS)}.{did_you_mean(method, METHODS)}'
    )
  groups = budget_groups(rows)
  grouped = sum(len(g) for _, g in groups)
  if not groups or grouped < 0.5 * len(rows):
    raise NoAllocation(
      f'Only {grouped} of {len(rows)} rows share a budget with others, so there are no isoFLOP '
      'curves; give a budget column, or fit a law to all rows (approach 3).'
    )
  profiles = tuple(
    profile(c, rows.params[g], rows.tokens[g], rows.loss[g], cost, method, window)
    for c, g in groups
  )
  rng = np.random.default_rng(seed)
  weights = None
  if noise is not None:
    steadied = [_steady(p, cost, noise, replicates, rng) for p in profiles]
    profiles = tuple(p for p, _ in steadied)
    weights = np.array([1 / spread**2 for _, spread in steadied if np.isfinite(spread)])
  used = [p for p in profiles if p.refused is None]
  if len(used) < 2:
    raise _too_few(profiles)
  c = np.array([p.flops for p in used])
  lowest = np.array([p.loss_opt for p in used])
  if not floor < lowest.min():
    raise NoAllocation(
      f'The isoFLOP minimum {lowest.min():.4g} is not above E, which is fixed at {floor:g}; fix it lower.'
    )
  n = np.array([p.params_opt for p in used])
  d = np.array([p.tokens_opt for p in used])
  return Allocation(
    approach=2,
    method=method,
    params=power_law(c, n, weights),
    tokens=power_law(c, d, weights),
    loss=power_law(c, lowest, weights, floor),
    profiles=profiles,
    samples=_resample(used, cost, method, noise, weights, floor, replicates, rng),
    drift=_drift(used),
  )


def _too_few(profiles: tuple[Profile, ...]) -> NoAllocation:
  """The error for fewer than two minima, with the budgets that were refused for each reason."""
  budgets_of = collections.defaultdict(list)
  for p in profiles:
    if p.refused:
      budgets_of[p.refused].append(f'{p.flops:.3g}')
  count = len([p for p in profiles if p.refused is None])
  reasons = '; '.join(f'{", ".join(budgets)}: {why}' for why, budgets in budgets_of.items())
  return NoAllocation(
    f'{count} of {len(profiles)} budgets have an isoFLOP minimum, and a power law needs 2'
    + (f' ({reasons}).' if reasons else '.')
  )


def _steady(p: Profile, cost, noise, replicates, rng) -> tuple[Profile, float]:
  """(the profile with the median optimum of noisy copies, the spread of ln N* by which it is weighed)."""
  if len(p.params) < FEWEST_SIZES[p.method]:
    return p, np.nan
  x = np.log(p.params)
  optima, _ = _minima(x, p.loss + noise * rng.normal(size=(replicates, len(x))), p.method)
  inside = np.isfinite(optima)
  if inside.mean() < 0.5:
    why = (
      p.refused
      or f'under a noise of {noise:g} nats most copies of the curve have no minimum inside'
    )
    blank = dict.fromkeys(('params_opt', 'tokens_opt', 'loss_opt'), np.nan)
    return dataclasses.replace(p, refused=why, **blank), np.nan
  n = float(np.exp(np.median(optima[inside])))
  loss = float(interpolant(x, p.loss, p.method)(np.log(n)))
  # Copies without a minimum inside have no N*: the fewer remain, the more their spread understates the noise.
  # And no curve locates its optimum much better than the spacing of its sizes.
  spread = max(optima[inside].std(), np.ptp(x) / (len(x) - 1) / 3) / inside.mean()
  best = {'params_opt': n, 'tokens_opt': float(cost.tokens(n, p.flops)), 'loss_opt': loss}
  return dataclasses.replace(p, refused=None, **best), float(spread)


def _resample(used, cost, method, noise, weights, floor, replicates, rng) -> np.ndarray:
  """(exponent, ln k) of N*, D* and L* - floor for redrawn losses, [replicates, 6]."""
  smooth, residuals, freedom = [], [], 0
  degree = DEGREE.get(method, 2)
  for p in used:
    x = np.log(p.params) - np.log(p.params).mean()
    fitted = np.polyval(np.polyfit(x, p.loss, min(degree, len(x) - 1)), x)
    smooth.append(p.loss if method == 'akima' else fitted)
    residuals.append(p.loss - fitted)
    freedom += max(len(x) - degree - 1, 0)
  # Every profile goes through all its points, so that nothing is known of the noise.
  if noise is None and freedom == 0:
    return np.full((1, 6), np.nan)
  pool = np.concatenate(residuals)
  # Residuals are smaller than the noise by the degrees of freedom that the profiles took.
  pool = (pool - pool.mean()) * np.sqrt(len(pool) / max(freedom, 1))
  ln_c = np.log([p.flops for p in used])
  minima, lowest = np.full((2, replicates, len(used)), np.nan)
  for j, (p, center) in enumerate(zip(used, smooth, strict=True)):
    shape = (replicates, len(center))
    drawn = rng.choice(pool, size=shape) if noise is None else noise * rng.normal(size=shape)
    minima[:, j], lowest[:, j] = _minima(np.log(p.params), center + drawn, method)
  # A curve may lose its minimum in a replicate, whose power law then goes through the others.
  samples = np.full((replicates, 6), np.nan)
  for r in range(replicates):
    good = np.isfinite(minima[r]) & (lowest[r] > floor)
    if good.sum() >= 2:
      c, n = np.exp(ln_c[good]), np.exp(minima[r, good])
      w = None if weights is None else weights[good]
      laws = [power_law(c, v, w) for v in (n, cost.tokens(n, c), lowest[r, good] - floor)]
      samples[r] = [value for law in laws for value in (law.exponent, law.ln_k)]
  return samples


def _minima(ln_n, losses, method) -> tuple[np.ndarray, np.ndarray]:
  """(ln N*, loss*), [replicates] each, of many noisy copies of a profile [replicates, sizes].

  NaN where a copy has no minimum inside the sizes. It is `_minimum` without a loop over replicates.
  """
  x = ln_n - ln_n.mean()
  if method == 'parabola':
    a, b, c = np.polyfit(x, losses.T, 2)
    with np.errstate(divide='ignore', invalid='ignore'):
      ln_n_opt = ln_n.mean() - b / (2 * a)
    good = (a > 0) & (ln_n_opt > ln_n[0]) & (ln_n_opt < ln_n[-1])
    lowest = c - b * b / (4 * np.where(good, a, 1.0))
    return np.where(good, ln_n_opt, np.nan), np.where(good, lowest, np.nan)
  grid = np.linspace(ln_n[0], ln_n[-1], 601)
  if method == 'akima':
    values = Akima1DInterpolator(ln_n, losses.T)(grid)
  else:
    values = np.vander(grid - ln_n.mean(), 4) @ np.polyfit(x, losses.T, 3)
  k = values.argmin(0)
  interior = np.clip(k, 1, len(grid) - 2)
  lower, middle, upper = (values[interior + i, np.arange(len(losses))] for i in (-1, 0, 1))
  # The vertex of the parabola through three points of the grid.
  bend = np.maximum(lower - 2 * middle + upper, 1e-300)
  shift = np.clip((lower - upper) / (2 * bend), -1, 1) * (grid[1] - grid[0])
  inside = interior == k
  return np.where(inside, grid[interior] + shift, np.nan), np.where(inside, middle, np.nan)


def _drift(used) -> float:
  """How far the optimum moves against the grid's centre, in e-folds of N over the range of budgets.

  A grid that is centred on the optimum at one end and off it at the other tilts the exponent of a parabola.
  """
  off = [np.log(p.params_opt) - np.log(p.params).mean() for p in used]
  slope = np.polyfit(np.log([p.flops for p in used]), off, 1)[0] if len(used) > 1 else 0.0
  return float(slope * np.ptp(np.log([p.flops for p in used])))
