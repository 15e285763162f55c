"""Writes an analysis as plain text."""

import numpy as np

from research.scaling import comparison, fitted

# Rows left out that are listed; the others are counted.
MOST_EXCLUDED = 8


def summary(a) -> str:
  """The text of `print(analysis)`: the rows, each approach, the exponents, the notes."""
  lines = [*_rows(a), *_approach2(a), *_approach3(a)]
  lines += [f'{name} refused: {why}' for name, why in a.refusals.items()]
  lines.append(f'Exponents, with {a.level:.0%} intervals (N* ~ C^a, D* ~ C^b):')
  for name, (value, low, high) in a.exponents().items():
    spread = f' [{low:.4f}, {high:.4f}]' if np.isfinite(low) else ''
    if a.assumed and name.endswith('3'):
      spread = f' assumed, since {a.assumed}'
    lines.append(f'  {name:14s} {value:.4f}{spread}')
  lines += [_split(a), *_trials(a)]
  lines += [f'Note: {note}' for note in a.notes]
  return '\n'.join(lines)


def _rows(a) -> list[str]:
  """Lines on the rows: how many, the doubts about them, what was assumed, and which were left out."""
  params = a.rows.columns.get('params', 'params')
  lines = [f'{len(a.rows)} runs, N = {params}, {a.cost}, loss in nats per token']
  lines += [f'Doubt: {doubt}' for doubt in a.doubts]
  lines += [f'Assumed: {remark}' for remark in a.rows.remarks]
  if a.rows.excluded:
    lines.append(f'{len(a.rows.excluded)} rows left out:')
    lines += [f'  {run}: {why}' for run, why in a.rows.excluded[:MOST_EXCLUDED]]
  if len(a.rows.excluded) > MOST_EXCLUDED:
    lines.append(f'  and {len(a.rows.excluded) - MOST_EXCLUDED} more')
  return lines


def _approach2(a) -> list[str]:
  """A line for each isoFLOP curve."""
  if a.approach2 is None:
    return []
  lines = [f'Approach 2 ({a.approach2.method}), minima of the isoFLOP curves:']
  for p in a.approach2.profiles:
    if p.refused:
      lines.append(f'  C {p.flops:<9.3g} refused: {p.refused}')
    else:
      optimum = f'N* {p.params_opt:<9.3g} D* {p.tokens_opt:<9.3g} loss {p.loss_opt:.4f}'
      lines.append(f'  C {p.flops:<9.3g} {optimum}' + ''.join(f'  ({w})' for w in p.warnings))
  return lines


def _approach3(a) -> list[str]:
  """Lines on the fitted law: its parameters, its minima, and its form beside others."""
  if a.approach3 is None:
    return []
  fit = a.approach3
  spread = a.bootstrap.intervals(a.level)
  lines = [f'Approach 3, {fit.law.name}: L = {fit.law.form}   objective {fit.objective:.10g}']
  for name, value in fit.parameters.items():
    low, high = spread[name]
    lines.append(f'  {name:6s} {value:<11.5g} [{low:.4g}, {high:.4g}]')
  lines += fitted.show_minima(fit)
  if sentence := comparison.sentence(a.compared, dict(fit.problem.fixed)):
    lines.append(f'  {sentence}')
  return lines


def _trials(a) -> list[str]:
  """The errors of each approach where it forecasts larger budgets of the sweep from smaller ones."""
  if not a.trials:
    return []
  lines = ['Forecasts of the larger budgets from the smaller ones (error of the loss):']
  for name in ('approach 2', 'approach 3'):
    trials = [trial for trial in a.trials if trial.approach == name]
    share = ''
    if a.rule == 'mean of approaches':
      share = f'; its share in a forecast {a.shares.get(name, 0):.0%}'
    lines.append(f'  {name}: {_errors(trials)}{share}')
  return lines


def _split(a) -> str:
  """A line with N*, D* and D / N at the largest budget, and the interval of the ratio."""
  largest = float(a.rows.flops.max())
  best = a.optimum(largest)
  drawn = a.optimum_samples(largest)
  low, high = a.interval(np.ravel(drawn.tokens / drawn.params))
  spread = f' [{low:.3g}, {high:.3g}]' if np.isfinite(low) else ''
  if a.assumed:
    spread += f', {a.assumed} assumed'
  return (
    f'At C = {largest:.3g}, the largest: N* {float(best.params):.3g}, D* {float(best.tokens):.3g}, '
    f'{float(best.tokens / best.params):.3g} tokens per parameter{spread}'
  )


def _errors(trials, most: int = 6) -> str:
  """Up to `most` errors one by one, or of more their root mean square by distance."""
  if len(trials) <= most:
    return ', '.join(f'{np.expm1(t.error):+.1%} at {t.distance:.3g}x' for t in trials)
  errors = np.array([t.error for t in trials])
  distances = np.array([t.distance for t in trials])
  parts = []
  for low, high in ((1, 4), (4, 30), (30, np.inf)):
    near = (distances > low) & (distances <= high)
    if near.any():
      reach = f'up to {high}x' if high < np.inf else 'beyond'
      parts.append(f'{np.sqrt((errors[near] ** 2).mean()):.1%} {reach}')
  return f'rms {", ".join(parts)} ({len(trials)} forecasts)'
