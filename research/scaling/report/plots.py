"""Figures a paper could use. Each returns a matplotlib Figure and touches no global state."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from research.scaling.analysis import Analysis
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.laws.base import LawError
from research.scaling.report.figure import (
  ACCENT,
  INK,
  MAP,
  SECOND,
  budget_colors,
  budget_markers,
  log_scale,
  new_figure,
)
from research.scaling.report.page import GREEK

BAND = 'interval'


def isoflop(a: Analysis, ax=None):
  """Loss against N at each budget, the fitted profiles and their minima; refused curves are dashed."""
  figure, ax = _own(ax)
  if a.approach2 is None:
    return _says(figure, ax, a.refusals.get('approach 2', 'no isoFLOP curves'))
  profiles = a.approach2.profiles
  budgets = [p.flops for p in profiles]
  looks = zip(profiles, budget_colors(budgets), budget_markers(budgets), strict=True)
  for p, color, marker in looks:
    label = f'{p.flops:.2g}' + (' (refused)' if p.refused else '')
    ax.plot(p.params, p.loss, marker, color=color, markersize=4.5, label=label)
    if p.refused:
      ax.plot(p.params, p.loss, '--', color=color, linewidth=0.9)
      continue
    ax.plot(*p.curve(), '-', color=color, linewidth=1.4)
    ax.plot(
      p.params_opt, p.loss_opt, '*', color=ACCENT, markersize=11, markeredgecolor='white', zorder=5
    )
  log_scale(ax, 'x')
  ax.set(
    xlabel='parameters $N$', ylabel='loss (nats per token)', title='IsoFLOP curves and their minima'
  )
  ax.legend(
    title='FLOPs', fontsize=7, title_fontsize=8, frameon=False, ncols=1 + (len(profiles) > 6)
  )
  return figure


def surface(a: Analysis, ax=None):
  """Contours of the fitted loss over C and N, the runs, and the efficient frontier."""
  figure, ax = _own(ax)
  if a.approach3 is None:
    return _says(figure, ax, a.refusals.get('approach 3', 'no law was fitted'))
  c, n = (_span(v, pad) for v, pad in ((a.rows.flops, 2.0), (a.rows.params, 1.6)))
  grid_c, grid_n = np.meshgrid(c, n)
  tokens = a.cost.tokens(grid_n, grid_c)
  loss = a.predict(grid_n, tokens)
  shown = a.rows.loss
  top = min(shown.max() * 1.05, shown.min() * 4)
  levels = np.geomspace(max(loss.min(), shown.min() * 0.95), top, 14)
  filled = ax.contour(grid_c, grid_n, loss, levels=levels, cmap=MAP, linewidths=1.0, norm=LogNorm())
  ax.clabel(filled, fmt='%.2f', fontsize=6)
  ax.scatter(
    a.rows.flops,
    a.rows.params,
    c=shown,
    cmap=MAP,
    norm=filled.norm,
    s=16,
    edgecolor=INK,
    linewidth=0.3,
  )
  best = a.optimum(c)
  inside = (best.params > n[0]) & (best.params < n[-1])
  ax.plot(c[inside], best.params[inside], color=ACCENT, linewidth=2, label='efficient frontier')
  log_scale(ax, 'x'), log_scale(ax, 'y')
  ax.set(
    xlabel='training FLOPs $C$',
    ylabel='parameters $N$',
    title=f'Fitted loss, {a.approach3.law.name}',
  )
  ax.legend(frameon=False, fontsize=8, loc='upper left')
  return figure


def allocation(a: Analysis, forecast: Forecast | None = None):
  """N* and D* against C by every approach, with bootstrap bands."""
  figure, axes = new_figure(2)
  ends = [a.rows.flops.min(), max(a.rows.flops.max() * 2, forecast.flops * 1.3 if forecast else 0)]
  c = np.geomspace(*ends, 60)
  many = a.optimum_samples(c)
  best = a.optimum(c)
  exponents = a.exponents()
  for ax, name, field in ((axes[0], 'a', 'params'), (axes[1], 'b', 'tokens')):
    which = 3 if a.approach3 is not None else 2
    band = a.interval(getattr(many, field))
    ax.fill_between(
      c, *band, color=ACCENT, alpha=0.15, linewidth=0, label=f'{BAND} of approach {which}'
    )
    ax.plot(c, getattr(best, field), color=ACCENT, label=_slope_label(exponents, name, which))
    for k, answer, color in ((2, a.approach2, SECOND), (1, a.approach1, '#7d3c98')):
      if answer is None or k == which:
        continue
      if k == 2:
        band = a.interval(getattr(a.optimum_samples(c, 'approach 2'), field))
        ax.fill_between(
          c, *band, color=SECOND, alpha=0.15, linewidth=0, label=f'{BAND} of approach 2'
        )
      ax.plot(
        c, getattr(answer, field)(c), '--', color=color, label=_slope_label(exponents, name, k)
      )
    if a.approach2 is not None:
      for p in a.approach2.used:
        ax.plot(p.flops, getattr(p, f'{field}_opt'), 'o', color=SECOND, markersize=5)
    if forecast is not None:
      ax.plot(
        forecast.flops,
        getattr(forecast, field),
        '*',
        color=INK,
        markersize=12,
        label='forecast run',
      )
    log_scale(ax, 'x'), log_scale(ax, 'y')
    ax.set_xlabel('training FLOPs $C$')
    ax.legend(frameon=False, fontsize=8)
  axes[0].set(ylabel='$N^*$, parameters', title='Compute-optimal parameters')
  axes[1].set(ylabel='$D^*$, tokens', title='Compute-optimal tokens')
  return figure


def forecast(a: Analysis, forecast: Forecast, outcome: float | None = None):
  """What the rule in use forecasts at every C, with its band, the fitted minima, and what came of it."""
  figure, (ax,) = new_figure(size=(6.0, 4.2))
  c = np.geomspace(a.rows.flops.min(), forecast.flops * 1.3, 60)
  _by_the_rule(ax, a, np.geomspace(c[0], c[-1], 12))
  law = 'law' if a.approach3 is not None else 'power law'
  ax.plot(c, a.optimum(c).loss, color=ACCENT, linewidth=1, label=f'$L^*(C)$ of the fitted {law}')
  ax.plot(a.rows.flops, a.rows.loss, '.', color='#999999', markersize=4, label='runs of the fit')
  if a.approach2 is not None:
    used = a.approach2.used
    if a.approach3 is not None:
      straight = 'power law through the minima'
      ax.plot(c, a.approach2.loss(c), '--', color=SECOND, linewidth=1, label=straight)
    ax.plot(
      [p.flops for p in used], [p.loss_opt for p in used], 'o', color=SECOND, label='isoFLOP minima'
    )
  error = [[forecast.loss - forecast.loss_low], [forecast.loss_high - forecast.loss]]
  error = None if np.isnan(error).any() else np.maximum(error, 0)
  label = f'forecast {forecast.loss:.4f}'
  ax.errorbar(forecast.flops, forecast.loss, error, fmt='s', color=INK, capsize=4, label=label)
  if outcome is not None:
    miss = f'outcome {outcome:.4f} (forecast {forecast.error(outcome):+.2%})'
    ax.plot(
      forecast.flops, outcome, '*', color='#27ae60', markersize=14, markeredgecolor=INK, label=miss
    )
  log_scale(ax, 'x'), log_scale(ax, 'y', plain=True)
  title = f'Forecast at {forecast.extrapolation:.2g}x the largest fitted budget'
  ax.set(xlabel='training FLOPs $C$', ylabel='loss (nats per token)', title=title)
  ax.legend(frameon=False, fontsize=8)
  return figure


def _by_the_rule(ax, a: Analysis, flops):
  """The forecasts of `a.rule`, each of one new run with its own scatter."""
  try:
    forecasts = [a.forecast(float(c)) for c in flops]
  except NoForecast:
    return
  low, high = ([getattr(f, name) for f in forecasts] for name in ('loss_low', 'loss_high'))
  ax.fill_between(flops, low, high, color=INK, alpha=0.1, linewidth=0, label=f'its {BAND}')
  ax.plot(
    flops, [f.loss for f in forecasts], color=INK, linewidth=1.2, label=f'by the rule: {a.rule}'
  )


def residuals(a: Analysis):
  """ln(fitted / observed) against N, D, C and D / N."""
  figure, axes = new_figure(2, 2, size=(4.6, 3.1), sharey=True)
  if a.approach3 is None:
    return _says(figure, axes[0], a.refusals.get('approach 3', 'no law was fitted'))
  r, rows = a.approach3.residuals, a.rows
  names = {
    'parameters $N$': rows.params,
    'tokens $D$': rows.tokens,
    'FLOPs $C$': rows.flops,
    'tokens per parameter': rows.tokens / rows.params,
  }
  for ax, (name, x) in zip(axes, names.items(), strict=True):
    ax.axhline(0, color=INK, linewidth=0.8)
    norm = LogNorm(rows.flops.min(), max(rows.flops.max(), 1.001 * rows.flops.min()))
    dots = ax.scatter(x, 100 * r, c=rows.flops, cmap=MAP, norm=norm, s=14, edgecolor='none')
    log_scale(ax, 'x')
    ax.set_xlabel(name)
    ax.yaxis.set_major_locator(MaxNLocator(5))
  unit = (
    'fitted over observed, %'
    if a.approach3.problem.residuals == 'log'
    else '100 (fitted - observed)'
  )
  for ax in axes[::2]:
    ax.set_ylabel(unit)
  figure.colorbar(dots, ax=list(axes), label='training FLOPs $C$', shrink=0.8)
  return figure


def bootstrap(a: Analysis, most: int = 1000):
  """Clouds of the bootstrapped parameters, two by two, with the fit itself in red."""
  if a.approach3 is None:
    figure, ax = _own(None)
    return _says(figure, ax, a.refusals.get('approach 3', 'no law was fitted'))
  values = a.bootstrap.parameters
  pairs = [
    p
    for p in (('alpha', 'beta'), ('A', 'alpha'), ('B', 'beta'), ('E', 'alpha'))
    if set(p) <= set(values)
  ]
  free = a.approach3.problem.free
  pairs = pairs or [(x, y) for i, x in enumerate(free) for y in free[i + 1 :]][:4]
  columns = min(len(pairs), 2)
  figure, axes = new_figure(columns, -(-len(pairs) // columns), size=(4.2, 3.2))
  for ax, (x, y) in zip(axes, pairs, strict=False):
    ax.plot(values[x][:most], values[y][:most], '.', color=SECOND, markersize=2.5, alpha=0.4)
    best = a.approach3.parameters
    ax.plot(best[x], best[y], '*', color=ACCENT, markersize=12, markeredgecolor='white')
    if x in 'AB' and values[x].min() > 0 and values[x].max() > 5 * values[x].min():
      log_scale(ax, 'x')
    else:
      ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set(xlabel=_math(x), ylabel=_math(y))
  figure.suptitle(f'{a.bootstrap.replicates} bootstrap fits ({a.bootstrap.kind})', fontsize=10)
  return figure


def overview(a: Analysis):
  """IsoFLOP curves beside the loss surface: what a notebook shows."""
  figure, axes = new_figure(2)
  isoflop(a, axes[0])
  surface(a, axes[1])
  return figure


def _own(ax):
  if ax is not None:
    return ax.figure, ax
  figure, (ax,) = new_figure(size=(6.0, 4.4))
  return figure, ax


def _span(values, pad):
  return np.geomspace(values.min() / pad, values.max() * pad, 120)


def _slope_label(exponents, name, approach):
  key = f'{name}, approach {approach}'
  if key not in exponents:
    raise LawError(f'{key} was not fitted.')
  value, low, high = exponents[key]
  spread = f' [{low:.2f}, {high:.2f}]' if np.isfinite(low) else ''
  return f'approach {approach}: ${name}$ = {value:.3f}{spread}'


def _math(name: str) -> str:
  """A parameter's name as mathematics: alpha is the letter."""
  return rf'$\{name}$' if name in GREEK else name if '_' in name or len(name) > 2 else f'${name}$'


def _says(figure, ax, why):
  import textwrap

  for other in figure.axes:
    if other is not ax and len(figure.axes) > 2:
      other.set_axis_off()
  ax.set_axis_off()
  ax.text(
    0.5,
    0.5,
    '\n'.join(textwrap.wrap(why, 60)),
    ha='center',
    va='center',
    transform=ax.transAxes,
    fontsize=9,
  )
  return figure
