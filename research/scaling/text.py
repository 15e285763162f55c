"""An analysis as plain text."""

import numpy as np

from research.scaling import comparison, fitted


def summary(a) -> str:
  """What `print(analysis)` shows: the runs, each approach, the exponents, the notes."""
  lines = [
    f'{len(a.rows)} runs, N = {a.rows.columns.get("params", "params")}, {a.cost}, loss in nats per token'
  ]
  lines += [f'Doubt: {doubt}' for doubt in a.doubts]
  lines += [f'Assumed: {remark}' for remark in a.rows.remarks]
  if a.rows.excluded:
    lines.append(f'{len(a.rows.excluded)} rows left out:')
    lines += [f'  {run}: {why}' for run, why in a.rows.excluded[:8]]
    if len(a.rows.excluded) > 8:
      lines.append(f'  and {len(a.rows.excluded) - 8} more')
  if a.approach2 is not None:
    lines.append(f'Approach 2 ({a.approach2.method}), minima of the isoFLOP curves:')
    for p in a.approach2.profiles:
      if p.refused:
        lines.append(f'  C {p.flops:<9.3g} refused: {p.refused}')
      else:
        optimum = f'N* {p.params_opt:<9.3g} D* {p.tokens_opt:<9.3g} loss {p.loss_opt:.4f}'
        lines.append(f'  C {p.flops:<9.3g} {optimum}' + ''.join(f'  ({w})' for w in p.warnings))
  if a.approach3 is not None:
    fit, spread = a.approach3, a.bootstrap.intervals(a.level)
    lines.append(f'Approach 3, {fit.law.name}: L = {fit.law.form}   objective {fit.objective:.10g}')
    for name, value in fit.parameters.items():
      low, high = spread[name]
      lines.append(f'  {name:6s} {value:<11.5g} [{low:.4g}, {high:.4g}]')
    lines += fitted.show_minima(fit)
    if sentence := comparison.sentence(a.compared):
      lines.append(f'  {sentence}')
  for name, why in a.refusals.items():
    lines.append(f'{name} refused: {why}')
  lines.append(f'Exponents, with {a.level:.0%} intervals (N* ~ C^a, D* ~ C^b):')
  for name, (value, low, high) in a.exponents().items():
    spread = f' [{low:.4f}, {high:.4f}]' if np.isfinite(low) else ''
    if a.assumed and name.endswith('3'):
      spread = f' assumed, since {a.assumed}'
    lines.append(f'  {name:14s} {value:.4f}{spread}')
  lines.append(_split(a))
  if a.trials:
    lines.append(
      'Forecasts of the larger budgets from the smaller ones (loss, forecast over found):'
    )
    for name in ('approach 2', 'approach 3'):
      tried, share = [t for t in a.trials if t.approach == name], a.shares.get(name, 0)
      weighed = f'; its share in a forecast {share:.0%}' if a.rule == 'mean of approaches' else ''
      lines.append(f'  {name}: {_errors(tried)}{weighed}')
  lines += [f'Note: {note}' for note in a.notes]
  return '\n'.join(lines)


def _split(a) -> str:
  """N*, D* and D / N at the largest budget, with the interval of the ratio."""
  largest = float(a.rows.flops.max())
  best, drawn = a.optimum(largest), a.optimum_samples(largest)
  low, high = a.interval(np.ravel(drawn.tokens / drawn.params))
  spread = f' [{low:.3g}, {high:.3g}]' if np.isfinite(low) else ''
  if a.assumed:
    spread += f', {a.assumed} assumed'
  return (
    f'At C = {largest:.3g}, the largest: N* {float(best.params):.3g}, D* {float(best.tokens):.3g}, '
    f'{float(best.tokens / best.params):.3g} tokens per parameter{spread}'
  )


def _errors(trials, most: int = 6) -> str:
  """Every error, or of many their root mean square by distance."""
  if len(trials) <= most:
    return ', '.join(f'{np.expm1(t.error):+.1%} at {t.distance:.3g}x' for t in trials)
  errors, distances = np.array([t.error for t in trials]), np.array([t.distance for t in trials])
  parts = []
  for low, high in ((1, 4), (4, 30), (30, np.inf)):
    near = (distances > low) & (distances <= high)
    if near.any():
      reach = f'up to {high}x' if high < np.inf else 'beyond'
      parts.append(f'{np.sqrt((errors[near] ** 2).mean()):.1%} {reach}')
  return f'rms {", ".join(parts)} ({len(trials)} forecasts)'
