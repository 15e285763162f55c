"""FIXME: say what this module is."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from research.scaling import allocation, approaches, bootstrap, envelope, fitted, law_fit, laws
from research.scaling import rows as table
from research.scaling.analysis import Analysis, NoForecast
from research.scaling.cost import fit_cost
from research.scaling.laws.base import Law, LawError

_COLUMNS, _CHINCHILLA = table.Columns(), laws.Chinchilla()


def fit_results(
  rows,
  *,
  columns: table.Columns = _COLUMNS,
  law: Law = _CHINCHILLA,
  profile: str = 'parabola',
  noise: float | None = None,
  curves: Mapping | None = None,
  role: str | None = 'fit',
  drop_highest: int = 0,
  robust: str = 'huber',
  delta: float = 1e-3,
  tau: float = 0.5,
  starts='grid',
  residuals: str = 'log',
  fixed: Mapping[str, float] | None = None,
  tied: Mapping[str, str] | None = None,
  resample: str = 'residual',
  replicates: int = 1000,
  level: float = 0.9,
  seed: int = 0,
  conventions: bool = True,
) -> Analysis:
  """Approaches 1 (given `curves`), 2 and 3 with bootstrap intervals.

  Args:
    rows: a path (.csv, .jsonl, .json, .parquet), a list of dicts, or Observations.
    columns: which columns hold N, D, C and the loss, and their units; see rows.Columns.
    law: what approach 3 fits; where it is not identifiable its reasons are kept and TiedChinchilla is tried.
    profile, noise: approach 2's interpolation and seed noise; see approaches.isoflop.
    curves: run -> [(tokens, loss), ...] for approach 1.
    drop_highest: leave out this many of the highest losses (Besiroglu et al. 2024 drop 5).
    robust, delta, tau, starts, residuals, fixed, tied: see fits.fit. A fixed E is approach 2's asymptote too.
    resample: 'residual', 'pairs', 'cluster by run' or 'cluster by budget'.
    conventions: also fit every count of N and C that the rows hold, for the table of conventions.
  """
  if isinstance(rows, (str, pathlib.Path)):
    rows = table.read_table(rows)
  compare = list(rows) if conventions and not isinstance(rows, table.Observations) else None
  rows = rows if compare is None else compare
  seen = rows if isinstance(rows, table.Observations) else table.observe(rows, columns, role)
  seen = _without_highest(seen, drop_highest)
  _check_law(law, seen)
  if replicates < 1:
    raise LawError(f'{replicates} bootstrap replicates tell no interval; ask for 1 or more.')
  cost = fit_cost(seen.params, seen.tokens, seen.flops)
  refusals: dict[str, str] = {}
  floor = float((fixed or {}).get('E', 0.0))
  one = _approach1(curves, seen, cost, refusals)
  try:
    two = approaches.isoflop(
      seen, cost, method=profile, noise=noise, floor=floor, replicates=replicates, seed=seed
    )
  except allocation.NoAllocation as e:
    two, refusals['approach 2'] = None, str(e)
  options = {
    'robust': robust, 'delta': delta, 'tau': tau, 'starts': starts, 'residuals': residuals,
    'fixed': fixed, 'tied': tied,
  }  # fmt: skip
  three = _approach3(law, seen, options, refusals)
  if three is None and two is None:
    raise NoForecast(' '.join(dict.fromkeys(refusals.values())))
  spread = None
  if three is not None:
    kind, groups = _resampling(resample, seen)
    spread = bootstrap.bootstrap(three, kind, groups=groups, replicates=replicates, seed=seed)
  result = Analysis(seen, cost, one, two, three, spread, refusals, level=level)
  from research.scaling import diagnostics

  quick = functools.partial(  # its exponents without tight intervals
    fit_results, law=law, profile=profile, noise=noise, role=role, drop_highest=drop_highest,
    **options, replicates=50, seed=seed, conventions=False,
  )  # fmt: skip
  more = () if compare is None else diagnostics.conventions(compare, columns, quick)
  return dataclasses.replace(result, notes=tuple(diagnostics.notes(result)), conventions=more)


def _check_law(law: Law, seen: table.Observations) -> None:
  """Approach 3 splits a budget into N and D, so it wants a law of those, and of what the rows hold."""
  if not {'params', 'tokens'} <= set(law.inputs) <= set(seen.inputs):
    raise LawError(
      f'{law.name} is a law of {", ".join(law.inputs)}; approach 3 fits laws of params and tokens (such as '
      'Chinchilla). For this one, call scaling.fit in Python with an array of each input.'
    )


def _without_highest(seen: table.Observations, count: int) -> table.Observations:
  if count <= 0:
    return seen
  highest = np.argsort(seen.loss, kind='stable')[-count:]
  keep = np.setdiff1d(np.arange(len(seen)), highest)
  dropped = tuple((str(seen.run[i]), f'one of the {count} highest losses') for i in highest)
  return dataclasses.replace(seen.take(keep), excluded=seen.excluded + dropped)


def _approach1(curves, seen, cost, refusals):
  if not curves:
    return None
  params = {str(run): float(n) for run, n in zip(seen.run, seen.params, strict=True)}
  try:
    return envelope.envelope({r: c for r, c in curves.items() if r in params}, params, cost)
  except allocation.NoAllocation as e:
    refusals['approach 1'] = str(e)
    return None


def _approach3(law, seen, options, refusals) -> fitted.Fit | None:
  for candidate in dict.fromkeys((law, laws.TiedChinchilla())):
    try:
      own = options
      if candidate is not law:  # names and starts are of the other law
        grid = options['starts'] if isinstance(options['starts'], str) else 'grid'
        own = {**options, 'fixed': None, 'tied': None, 'starts': grid}
      return law_fit.fit(candidate, seen.inputs, seen.loss, **own)
    except fitted.NotIdentifiable as e:
      refusals['approach 3' if candidate is law else 'approach 3, tied'] = str(e)
  return None


def _resampling(resample: str, seen) -> tuple[str, np.ndarray | None]:
  groups = {'cluster by run': seen.run, 'cluster by budget': seen.budget}
  if resample in groups:
    return 'cluster', groups[resample]
  if resample not in ('residual', 'pairs'):
    raise LawError(f'resample={resample!r} is none of residual, pairs, {", ".join(groups)}.')
  return resample, None
