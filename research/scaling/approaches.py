"""Approach 2 of Hoffmann et al. 2022: the minima of isoFLOP profiles. Approach 1 is in `envelope`.

Approach 3, the parametric fit, is `law_fit.fit` with a law of N and D.
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


def profile(flops, params, tokens, loss, cost: Cost, method='parabola', window=None) -> Profile:
  """One isoFLOP curve and its minimum, or why it has none.

  `window`: only sizes within this factor of the lowest point's (None: all). A curve is refused when it has
  fewer than 3 sizes (4 for a cubic, 5 for Akima), when the lowest loss is at the largest or the smallest size,
  when it is concave there, or when the fitted minimum falls outside the sizes that were run.
  """
  order = np.argsort(params, kind='stable')
  params, tokens, loss = (np.asarray(v, np.float64)[order] for v in (params, tokens, loss))
  params, tokens, loss = _merge(params, tokens, loss)
  if window is not None and len(loss):
    near = np.abs(np.log(params / params[np.argmin(loss)])) <= np.log(window) + 1e-9
    params, tokens, loss = params[near], tokens[near], loss[near]
  base = Profile(float(flops), params, tokens, loss, method)
  need = {'parabola': 3, 'cubic': 4, 'akima': 5}[method]
  if len(params) < need:
    count = '1 size' if len(params) == 1 else f'{len(params)} sizes'
    return dataclasses.replace(base, refused=f'{count}; a {method} needs {need}')
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
  warnings = (
    [] if 0 < lowest < len(loss) - 1 and len(params) > 3 else ['3 sizes: no check of the shape']
  )
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
  """Seeds of one size become their mean."""
  sizes, index = np.unique(params, return_inverse=True)
  count = np.bincount(index)
  mean = lambda v: np.bincount(index, weights=v) / np.maximum(count, 1)
  return sizes, mean(tokens), mean(loss)


def _minimum(ln_n, loss, method) -> tuple[float, float, str | None]:
  """(ln N*, loss*, why not)."""
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

  `floor`: the irreducible loss in nats, where it is known from elsewhere: a few budgets cannot tell it.

  `noise`: the loss's standard deviation from seed to seed, in nats, where it is known. Then each optimum is
  the median over noisy copies of its curve and counts by the inverse of its variance (no less than a third
  of the spacing of sizes), and a curve most of whose copies have no minimum inside is refused: the procedure
  of Porian et al. 2024 (arXiv:2406.19146, appendix). Otherwise optima count alike, and intervals come from the
  residuals about the profiles, pooled over budgets (with Akima, which leaves none, about parabolas).
  Raises NoAllocation where fewer than two budgets have a minimum that counts, or one lies below the floor.
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
    profiles, spread = zip(
      *(_steady(p, cost, noise, replicates, rng) for p in profiles), strict=True
    )
    weights = np.array([1 / w**2 for w in spread if np.isfinite(w)])
  used = [p for p in profiles if p.refused is None]
  if len(used) < 2:
    alike = collections.defaultdict(list)
    for p in profiles:
      if p.refused:
        alike[p.refused].append(f'{p.flops:.3g}')
    reasons = '; '.join(f'{", ".join(c)}: {why}' for why, c in alike.items())
    raise NoAllocation(
      f'{len(used)} of {len(profiles)} budgets have an isoFLOP minimum, and a power law needs 2'
      + (f' ({reasons}).' if reasons else '.')
    )
  c, lowest = (np.array([getattr(p, k) for p in used]) for k in ('flops', 'loss_opt'))
  if not floor < lowest.min():
    raise NoAllocation(
      f'The isoFLOP minimum {lowest.min():.4g} is not above E, which is held at {floor:g}; hold it lower.'
    )
  n, d = (np.array([getattr(p, k) for p in used]) for k in ('params_opt', 'tokens_opt'))
  return Allocation(
    2,
    method,
    power_law(c, n, weights),
    power_law(c, d, weights),
    power_law(c, lowest, weights, floor),
    tuple(profiles),
    _resample(used, cost, method, noise, weights, floor, replicates, rng),
    _drift(used),
  )


def _steady(p: Profile, cost, noise, replicates, rng) -> tuple[Profile, float]:
  """A profile whose optimum is the median over noisy copies, and the spread of ln N* that weighs it."""
  if p.refused and p.refused.split()[0].isdigit():  # too few sizes for any copy
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
  spread = max(optima[inside].std(), np.ptp(x) / (len(x) - 1) / 3) / inside.mean()
  best = {'params_opt': n, 'tokens_opt': float(cost.tokens(n, p.flops)), 'loss_opt': loss}
  return dataclasses.replace(p, refused=None, **best), float(spread)


def _resample(used, cost, method, noise, weights, floor, replicates, rng) -> np.ndarray:
  """[replicates, 6]: exponent and ln k of N*, D* and L* - floor for redrawn losses."""
  smooth, residuals, freedom = [], [], 0
  for p in used:
    degree = DEGREE.get(method, 2)
    x = np.log(p.params) - np.log(p.params).mean()
    fitted = np.polyval(np.polyfit(x, p.loss, min(degree, len(x) - 1)), x)
    smooth.append(p.loss if method == 'akima' else fitted)
    residuals.append(p.loss - fitted)
    freedom += max(len(x) - degree - 1, 0)
  if (
    noise is None and freedom == 0
  ):  # every profile passes through its points: they say nothing of noise
    return np.full((1, 6), np.nan)
  pool = np.concatenate(residuals)
  pool = (pool - pool.mean()) * np.sqrt(len(pool) / max(freedom, 1))
  ln_c = np.log([p.flops for p in used])
  minima, lowest = np.full((2, replicates, len(used)), np.nan)
  for j, (p, center) in enumerate(zip(used, smooth, strict=True)):
    shape = (replicates, len(center))
    drawn = rng.choice(pool, size=shape) if noise is None else noise * rng.normal(size=shape)
    minima[:, j], lowest[:, j] = _minima(np.log(p.params), center + drawn, method)
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
  """(ln N*, loss*) of many noisy copies of a profile [replicates, sizes]; NaN where there is none "
  "inside."""
  x = ln_n - ln_n.mean()
  if method == 'parabola':
    a, b, c = np.polyfit(x, losses.T, 2)
    with np.errstate(divide='ignore', invalid='ignore'):
      at = ln_n.mean() - b / (2 * a)
    good = (a > 0) & (at > ln_n[0]) & (at < ln_n[-1])
    return np.where(good, at, np.nan), np.where(
      good, c - b * b / (4 * np.where(good, a, 1.0)), np.nan
    )
  grid = np.linspace(ln_n[0], ln_n[-1], 601)
  if method == 'akima':
    values = Akima1DInterpolator(ln_n, losses.T)(grid)
  else:
    values = np.vander(grid - ln_n.mean(), 4) @ np.polyfit(x, losses.T, 3)
  k = values.argmin(0)
  at = np.clip(k, 1, len(grid) - 2)
  lower, middle, upper = (values[at + i, np.arange(len(losses))] for i in (-1, 0, 1))
  bend = np.maximum(lower - 2 * middle + upper, 1e-300)
  shift = np.clip((lower - upper) / (2 * bend), -1, 1) * (grid[1] - grid[0])
  inside = at == k
  return np.where(inside, grid[at] + shift, np.nan), np.where(inside, middle, np.nan)


def _drift(used) -> float:
  """How the grid's centre moves against the optimum, in e-folds of N over the range of budgets.

  A grid centred on the optimum at one end and off it at the other tilts the exponent that a parabola finds.
  """
  off = [np.log(p.params_opt) - np.log(p.params).mean() for p in used]
  slope = np.polyfit(np.log([p.flops for p in used]), off, 1)[0] if len(used) > 1 else 0.0
  return float(slope * np.ptp(np.log([p.flops for p in used])))
