"""What to look at before believing a fit."""

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
  """What approach 2 adds of its own: to the exponent a, and as a factor on N* at the largest budget."""

  exponent: float
  factor: float


def parabola_bias(a) -> Bias | None:
  """How far approach 2's N*(C) lies from the fitted law's own, on the very grid that was run.

  The law's noiseless losses at the runs' N and D go through the same profile; a parabola is exact only when
  alpha = beta and the grid is narrow and centred. Off-centre or wide grids shift N*, drifting ones tilt it.
  """
  if a.approach2 is None or a.approach3 is None:
    return None
  clean = dataclasses.replace(a.rows, loss=a.predict(a.rows.params, a.rows.tokens))
  try:
    two = approaches.isoflop(clean, a.cost, method=a.approach2.method, replicates=1)
  except allocation.NoAllocation:
    return None
  c = np.array([p.flops for p in two.used])
  true, _, _ = planning.optimum(a.approach3.law, a.approach3.parameters, c, a.cost)
  if not np.isfinite(true).all():
    return None
  slope = two.params.exponent - allocation.power_law(c, true).exponent
  return Bias(float(slope), float(two.params(c[-1]) / true[-1]))


def notes(a) -> list[str]:
  """Sentences for a reader, worst first."""
  out = []
  if 'flops' in a.rows.columns:
    sentence = not_six_nd(a.cost, a.rows.params, a.rows.tokens, a.rows.flops)
    out += [sentence] if sentence else []
  found = a.exponents()
  if {'a, approach 2', 'a, approach 3'} <= set(found):
    two, three = found['a, approach 2'], found['a, approach 3']
    if two[1] > three[2] or two[2] < three[1]:
      out.append(
        f'approaches 2 and 3 disagree about N* ~ C^a: {two[0]:.3f} and {three[0]:.3f}, intervals apart.'
      )
  bias = parabola_bias(a)
  if bias is not None and (abs(bias.exponent) > 0.005 or abs(np.log(bias.factor)) > 0.1):
    out.append(
      f'the {a.approach2.method} itself shifts approach 2: on the fitted surface this very grid '
      f'changes a by {bias.exponent:+.3f} and N* at the largest budget by {bias.factor - 1:+.0%}.'
    )
  if a.approach2 is not None and abs(a.approach2.drift) > 0.5:
    out.append(
      f'the optimum moves by {a.approach2.drift:+.2f} e-folds of N against the centre of the grid: '
      'centre every budget on its optimum.'
    )
  if a.approach2 is not None and len(a.approach2.used) == 2:
    out.append('approach 2 is a line through two minima: it has no residual to judge it by.')
  if a.approach3 is not None and (odd := outlying(a.approach3)).any():
    runs = ', '.join(f'{a.rows.run[i]} ({a.rows.loss[i]:.4g})' for i in np.flatnonzero(odd)[:5])
    out.append(
      f'off the law by more than 10 robust standard deviations ({odd.sum()}): {runs}. '
      'A diverged run wants a status of its own, or --drop_highest.'
    )
  if a.approach3 is not None:
    gap = np.log(a.approach3.fitted / a.rows.loss)
    if (found := comparison.misfit(a.rows, gap)) is not None:
      out.append(comparison.describe(found))
  apart = repeated(a.rows)
  if apart and max(apart) > 0.03:
    out.append(
      f'{len(apart)} settings of N and D were run more than once, with losses up to '
      f'{max(apart):.0%} apart: if these rows differ in more than a seed, fit them apart '
      '(--where=COLUMN=VALUE).'
    )
  near = (
    [m for m in a.approach3.minima[1:] if m.objective < 1.05 * a.approach3.objective]
    if a.approach3
    else []
  )
  if near:
    out.append(
      f'other minima within 5% of the best objective: {len(near)}; see the list of minima.'
    )
  return out


def outlying(fit: Fit, times: float = 10.0) -> np.ndarray:
  """Which rows [rows] lie `times` the spread of the others (1.4826 MAD) off the law, and by 2% at least."""
  r = np.abs(fit.residuals)
  least = 0.02 if fit.problem.residuals == 'log' else 0.02 * fit.observed
  return r > np.maximum(times * 1.4826 * np.median(r), least)


def repeated(rows: table.Observations) -> list[float]:
  """Of every N and D that was run more than once, highest loss / lowest - 1."""
  losses = collections.defaultdict(list)
  for n, d, loss in zip(rows.params, rows.tokens, rows.loss, strict=True):
    losses[f'{n:.6g}', f'{d:.6g}'].append(loss)
  return [max(v) / min(v) - 1 for v in losses.values() if len(v) > 1]


def delta_sweep(fit: Fit, deltas: Iterable[float] = (1e-4, 1e-3, 1e-2, 1e-1)) -> list[dict]:
  """The same fit under other Huber deltas: what depends on how outliers are treated."""
  return [{'delta': d, **_summary(law_fit.refit(fit, delta=d))} for d in deltas]


def outliers(fit: Fit, counts: Sequence[int] = (0, 1, 3, 5)) -> list[dict]:
  """The fit without the k highest losses, and without the k largest residuals: both answers."""
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
  p = fit.parameters
  exponent = {'a': p['beta'] / (p['alpha'] + p['beta'])} if {'alpha', 'beta'} <= set(p) else {}
  return {**exponent, **p, 'objective': fit.objective}


def leave_one_budget_out(a) -> list[dict]:
  """Approach 3 without each budget in turn, and how well it then predicts that budget's runs."""
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
  """Relative errors of predicted losses, percent."""
  x = {name: values[members] for name, values in rows.inputs.items() if name in fit.law.inputs}
  error = 100 * (fit.predict(**x) / rows.loss[members] - 1)
  return {'mean error %': float(error.mean()), 'rms error %': float(np.sqrt((error**2).mean()))}


def compare(laws: Iterable[Law], inputs: Mapping[str, np.ndarray], loss: np.ndarray) -> list[dict]:
  """AICc weights between laws, fitted by least squares of log residuals (normal errors in ln L).

  AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1), k counting the error's variance too
  (Hurvich & Tsai 1989). Only laws of the same output on the same rows compare.
  """
  results = []
  for law in laws:
    fit = law_fit.fit(law, inputs, loss, robust='l2', check=False)
    n, k = len(fit.observed), len(fit.problem.free) + 1
    rss = float((fit.residuals**2).sum())
    aicc = n * np.log(max(rss, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1e-9)
    results.append({'law': law.name, 'parameters': k - 1, 'rss': rss, 'aicc': float(aicc)})
  best = min(f['aicc'] for f in results)
  relative = [np.exp((best - f['aicc']) / 2) for f in results]
  for f, r in zip(results, relative, strict=True):
    f['weight'] = float(r / sum(relative))
  return results


def conventions(rows: Sequence[Mapping], columns: table.Columns, fit: Callable) -> tuple[dict, ...]:
  """The same fit under the other counts of N and of C that the rows hold; empty where they hold one of each.

  `fit(rows, columns=columns)` returns an Analysis. A convention that cannot be fitted says why in its row.
  """
  have = lambda names: [n for n in names if any(str(r.get(n, '') or '').strip() for r in rows)]
  params, flops = have(table.PARAMS), have(table.FLOPS)
  if len(params) * len(flops) < 2:
    return ()
  # Each N under the default C, each C under the default N, and Kaplan's pair.
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
    except (table.RowError, forecast.NoForecast, NotIdentifiable) as e:
      line |= {'law': str(e)}
    out.append(line)
  return tuple(out)
