"""Diagnostics of a fit: what its method adds, which rows it misses, and how it changes with its options."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.scaling import allocation, approaches, comparison, forecast, law_fit, planning
from research.scaling import rows as table
from research.scaling.cost import not_six_nd
from research.scaling.fitted import Fit, NotIdentifiable
from research.scaling.laws.base import Law


class Bias(NamedTuple):
  """The bias of approach 2's interpolation."""

  exponent: float  # added to a
  factor: float  # on N* at the largest budget


def parabola_bias(a) -> Bias | None:
  """How far approach 2's N*(C) is from the optimum of the fitted law, on the grid that was run.

  The law's losses at the runs' N and D, without noise, go through the same profiles. A parabola is exact only
  where alpha = beta and the grid is narrow and centred: a wide or off-centre grid shifts N*, and one that
  drifts changes the exponent. None where either approach is missing.
  """
  if a.approach2 is None or a.approach3 is None:
    return None
  clean = dataclasses.replace(a.rows, loss=a.predict(a.rows.params, a.rows.tokens))
  try:
    isoflop = approaches.isoflop(clean, a.cost, method=a.approach2.method, replicates=1)
  except allocation.NoAllocation:
    return None
  c = np.array([p.flops for p in isoflop.used])
  true, _, _ = planning.optimum(a.approach3.law, a.approach3.parameters, c, a.cost)
  if not np.isfinite(true).all():
    return None
  slope = isoflop.params.exponent - allocation.power_law(c, true).exponent
  return Bias(float(slope), float(isoflop.params(c[-1]) / true[-1]))


def notes(a) -> list[str]:
  """Sentences about an analysis for its reader, worst first."""
  return [*_about_cost(a), *_about_approach2(a), *_about_approach3(a)]


def _about_cost(a) -> list[str]:
  """A sentence where C is not 6 N D."""
  if 'flops' not in a.rows.columns:
    return []
  sentence = not_six_nd(a.cost, a.rows.params, a.rows.tokens, a.rows.flops)
  return [sentence] if sentence else []


def _about_approach2(a) -> list[str]:
  """Sentences where approach 2 disagrees with approach 3, or its method or its grid biases it."""
  out = []
  exponents = a.exponents()
  if {'a, approach 2', 'a, approach 3'} <= set(exponents):
    value2, low2, high2 = exponents['a, approach 2']
    value3, low3, high3 = exponents['a, approach 3']
    if low2 > high3 or high2 < low3:
      out.append(
        f'approaches 2 and 3 disagree about N* ~ C^a: {value2:.3f} and {value3:.3f}, intervals apart.'
      )
  bias = parabola_bias(a)
  if bias is not None and (abs(bias.exponent) > 0.005 or abs(np.log(bias.factor)) > 0.1):
    out.append(
      f'the {a.approach2.method} itself shifts approach 2: on the fitted surface this grid '
      f'changes a by {bias.exponent:+.3f} and N* at the largest budget by {bias.factor - 1:+.0%}.'
    )
  if a.approach2 is not None and abs(a.approach2.drift) > 0.5:
    out.append(
      f'the optimum moves by {a.approach2.drift:+.2f} e-folds of N against the centre of the grid: '
      'centre every budget on its optimum.'
    )
  if a.approach2 is not None and len(a.approach2.used) == 2:
    out.append('approach 2 is a line through two minima: it has no residual to judge it by.')
  return out


def _about_approach3(a) -> list[str]:
  """Sentences about rows off the law, trends that it misses, repeated settings, and other minima."""
  out = []
  if a.approach3 is not None and (odd := outlying(a.approach3)).any():
    runs = ', '.join(f'{a.rows.run[i]} ({a.rows.loss[i]:.4g})' for i in np.flatnonzero(odd)[:5])
    out.append(
      f'off the law by more than 10 robust standard deviations ({odd.sum()}): {runs}. '
      'Give a diverged run another status, or leave it out with --drop_highest.'
    )
  if a.approach3 is not None:
    gap = np.log(a.approach3.fitted / a.rows.loss)
    if (trend := comparison.misfit(a.rows, gap)) is not None:
      out.append(comparison.describe(trend))
  apart = repeated(a.rows)
  if apart and max(apart) > 0.03:
    out.append(
      f'{len(apart)} settings of N and D were run more than once, with losses up to '
      f'{max(apart):.0%} apart: if these rows differ in more than a seed, fit them apart '
      '(--where=COLUMN=VALUE).'
    )
  others = a.approach3.minima[1:] if a.approach3 else ()
  near = [m for m in others if m.objective < 1.05 * a.approach3.objective]
  if near:
    out.append(
      f'other minima within 5% of the best objective: {len(near)}; see the list of minima.'
    )
  return out


def outlying(fit: Fit, times: float = 10.0) -> np.ndarray:
  """A mask [rows] of the rows that are off the law by `times` the spread (1.4826 MAD), and by 2% at least.

  The 2% keep the rows of an almost exact fit, whose spread is rounding.
  """
  r = np.abs(fit.residuals)
  least = 0.02 if fit.problem.residuals == 'log' else 0.02 * fit.observed
  return r > np.maximum(times * 1.4826 * np.median(r), least)


def repeated(rows: table.Observations) -> list[float]:
  """(highest loss / lowest) - 1 of each N and D that was run more than once."""
  losses = collections.defaultdict(list)
  for n, d, loss in zip(rows.params, rows.tokens, rows.loss, strict=True):
    losses[f'{n:.6g}', f'{d:.6g}'].append(loss)
  return [max(v) / min(v) - 1 for v in losses.values() if len(v) > 1]


def delta_sweep(fit: Fit, deltas: Iterable[float] = (1e-4, 1e-3, 1e-2, 1e-1)) -> list[dict]:
  """The fit under other Huber deltas: which parameters depend on how outliers count. A dict for each."""
  return [{'delta': d, **_summary(law_fit.refit(fit, delta=d))} for d in deltas]


def outliers(fit: Fit, counts: Sequence[int] = (0, 1, 3, 5)) -> list[dict]:
  """The fit without the k highest losses, and without the k largest residuals. A dict for each."""
  out = []
  for rule, order in (
    ('highest losses', np.argsort(-fit.observed, kind='stable')),
    ('largest residuals', np.argsort(-np.abs(fit.residuals), kind='stable')),
  ):
    for k in counts:
      keep = np.setdiff1d(np.arange(len(order)), order[:k])
      out.append({'rule': rule, 'dropped': k, **_summary(law_fit.refit(fit, keep))})
  return out


def _summary(fit: Fit) -> dict:
  """The parameters, the objective, and the exponent a where the law has alpha and beta."""
  p = fit.parameters
  exponent = {'a': p['beta'] / (p['alpha'] + p['beta'])} if {'alpha', 'beta'} <= set(p) else {}
  return {**exponent, **p, 'objective': fit.objective}


def leave_one_budget_out(a) -> list[dict]:
  """Approach 3 without each budget in turn, and its errors on that budget's runs. A dict for each."""
  out = []
  for c, members in table.budget_groups(a.rows):
    rest = np.setdiff1d(np.arange(len(a.rows)), members)
    if len(rest) <= len(a.approach3.problem.free):
      continue
    other = law_fit.refit(a.approach3, rest)
    out.append(
      {'budget': c, 'runs': len(members), **_errors(other, a.rows, members), **_summary(other)}
    )
  return out


def _errors(fit, rows, members) -> dict:
  """Relative errors of the predicted losses of `members`, in percent."""
  x = {name: values[members] for name, values in rows.inputs.items() if name in fit.law.inputs}
  error = 100 * (fit.predict(**x) / rows.loss[members] - 1)
  return {'mean error %': float(error.mean()), 'rms error %': float(np.sqrt((error**2).mean()))}


def compare(laws: Iterable[Law], inputs: Mapping[str, np.ndarray], loss: np.ndarray) -> list[dict]:
  """AICc weights of laws, fitted by least squares of log residuals (normal errors in ln L). A dict for each.

  Only laws of the same output on the same rows can be compared.
  """
  results = []
  for law in laws:
    fit = law_fit.fit(law, inputs, loss, robust='l2', check=False)
    n, k = len(fit.observed), len(fit.problem.free) + 1
    rss = float((fit.residuals**2).sum())
    aicc = comparison.aicc(max(rss, 1e-300), n, k)
    results.append({'law': law.name, 'parameters': k - 1, 'rss': rss, 'aicc': aicc})
  best = min(f['aicc'] for f in results)
  relative = [np.exp((best - f['aicc']) / 2) for f in results]
  for f, r in zip(results, relative, strict=True):
    f['weight'] = float(r / sum(relative))
  return results


def conventions(rows: Sequence[Mapping], columns: table.Columns, fit: Callable) -> tuple[dict, ...]:
  """The fit under each count of N and of C that the rows have, a dict each; empty where they have one of each.

  Args:
    fit: `fit(rows, columns=columns)` returns an Analysis. A convention that it cannot fit gets the reason.
  """

  def present(names) -> list[str]:
    return [name for name in names if any(str(row.get(name, '') or '').strip() for row in rows)]

  params = present(table.PARAMS)
  flops = present(table.FLOPS)
  if len(params) * len(flops) < 2:
    return ()
  # Each N with the default C, each C with the default N, and Kaplan's pair.
  pairs = [*((n, flops[0]) for n in params), *((params[0], c) for c in flops[1:])]
  if 'params_non_embedding' in params and 'flops_6n_non_embedding' in flops:
    pairs.append(('params_non_embedding', 'flops_6n_non_embedding'))
  out = []
  for n, c in dict.fromkeys(pairs):
    line = {'N': n, 'C': c}
    try:
      a = fit(rows, columns=dataclasses.replace(columns, params=n, flops=c))
      line |= {k: round(v[0], 4) for k, v in a.exponents().items() if k.startswith('a,')}
      if a.approach3 is not None:
        line |= {'law': a.approach3.law.name}
        line |= {k: a.approach3.parameters.get(k, '') for k in ('alpha', 'beta', 'E')}
    except (table.RowError, forecast.NoForecast, NotIdentifiable) as error:
      line |= {'law': str(error)}
    out.append(line)
  return tuple(out)
