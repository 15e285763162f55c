"""Figures of an analysis. Each function returns a matplotlib Figure and changes no global state."""

import itertools
import textwrap

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

BAND = 'interval'  # the label of every band


def isoflop(a: Analysis, ax=None):
  """Loss against N at each budget, the fitted profiles and their minima; refused curves are dashed."""
  figure, ax = _figure_of(ax)
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
  figure, ax = _figure_of(ax)
  if a.approach3 is None:
    return _says(figure, ax, a.refusals.get('approach 3', 'no law was fitted'))
  c = _span(a.rows.flops, 2.0)
  n = _span(a.rows.params, 1.6)
  grid_c, grid_n = np.meshgrid(c, n)
  tokens = a.cost.tokens(grid_n, grid_c)
  loss = a.predict(grid_n, tokens)
  observed = a.rows.loss
  # Levels over the losses of the runs; a diverged run does not stretch them.
  top = min(observed.max() * 1.05, observed.min() * 4)
  levels = np.geomspace(max(loss.min(), observed.min() * 0.95), top, 14)
  lines = ax.contour(grid_c, grid_n, loss, levels=levels, cmap=MAP, linewidths=1.0, norm=LogNorm())
  ax.clabel(lines, fmt='%.2f', fontsize=6)
  ax.scatter(
    a.rows.flops, a.rows.params, c=observed, cmap=MAP, norm=lines.norm, s=16, edgecolor=INK,
    linewidth=0.3,
  )  # fmt: skip
  best = a.optimum(c)
  inside = (best.params > n[0]) & (best.params < n[-1])
  ax.plot(c[inside], best.params[inside], color=ACCENT, linewidth=2, label='efficient frontier')
  log_scale(ax, 'x')
  log_scale(ax, 'y')
  title = f'Fitted loss, {a.approach3.law.name}'
  ax.set(xlabel='training FLOPs $C$', ylabel='parameters $N$', title=title)
  ax.legend(frameon=False, fontsize=8, loc='upper left')
  return figure


def allocation(a: Analysis, forecast: Forecast | None = None):
  """N* and D* against C by every approach, with bootstrap bands."""
  figure, axes = new_figure(2)
  highest = max(a.rows.flops.max() * 2, forecast.flops * 1.3 if forecast else 0)
  c = np.geomspace(a.rows.flops.min(), highest, 60)
  best = a.optimum(c)
  samples = a.optimum_samples(c)
  exponents = a.exponents()
  for ax, name, field in ((axes[0], 'a', 'params'), (axes[1], 'b', 'tokens')):
    which = 3 if a.approach3 is not None else 2
    low, high = a.interval(getattr(samples, field))
    label = f'{BAND} of approach {which}'
    ax.fill_between(c, low, high, color=ACCENT, alpha=0.15, linewidth=0, label=label)
    label = _slope_label(exponents, name, which)
    ax.plot(c, getattr(best, field), color=ACCENT, label=label)
    _other_approaches(ax, a, c, exponents, name, field)
    if forecast is not None:
      size = getattr(forecast, field)
      ax.plot(forecast.flops, size, '*', color=INK, markersize=12, label='forecast run')
    log_scale(ax, 'x')
    log_scale(ax, 'y')
    ax.set_xlabel('training FLOPs $C$')
    ax.legend(frameon=False, fontsize=8)
  axes[0].set(ylabel='$N^*$, parameters', title='Compute-optimal parameters')
  axes[1].set(ylabel='$D^*$, tokens', title='Compute-optimal tokens')
  return figure


def _other_approaches(ax, a: Analysis, c, exponents: dict, name: str, field: str) -> None:
  """N* or D* at budgets `c` by the approaches beside the first choice, and the isoFLOP minima as dots."""
  if a.approach2 is not None and a.approach3 is not None:
    low, high = a.interval(getattr(a.optimum_samples(c, 'approach 2'), field))
    label = f'{BAND} of approach 2'
    ax.fill_between(c, low, high, color=SECOND, alpha=0.15, linewidth=0, label=label)
    label = _slope_label(exponents, name, 2)
    ax.plot(c, getattr(a.approach2, field)(c), '--', color=SECOND, label=label)
  if a.approach1 is not None:
    label = _slope_label(exponents, name, 1)
    ax.plot(c, getattr(a.approach1, field)(c), '--', color='#7d3c98', label=label)
  if a.approach2 is not None:
    for p in a.approach2.used:
      ax.plot(p.flops, getattr(p, f'{field}_opt'), 'o', color=SECOND, markersize=5)


def forecast(a: Analysis, forecast: Forecast, outcome: float | None = None):
  """The forecasts at every C by the rule in use, with their band, the fitted minima, and the outcome."""
  figure, (ax,) = new_figure(size=(6.0, 4.2))
  c = np.geomspace(a.rows.flops.min(), forecast.flops * 1.3, 60)
  # Fewer points: a rule may take a bootstrap for each.
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
  # Matplotlib refuses negative bars, as of a mean just outside its interval, and NaN.
  error = None if np.isnan(error).any() else np.maximum(error, 0)
  label = f'forecast {forecast.loss:.4f}'
  ax.errorbar(forecast.flops, forecast.loss, error, fmt='s', color=INK, capsize=4, label=label)
  if outcome is not None:
    miss = f'outcome {outcome:.4f} (forecast {forecast.error(outcome):+.2%})'
    ax.plot(
      forecast.flops, outcome, '*', color='#27ae60', markersize=14, markeredgecolor=INK, label=miss
    )
  log_scale(ax, 'x')
  log_scale(ax, 'y', plain=True)
  times, end = forecast.distance
  title = f'Forecast at {times:.2g}x the {end} fitted budget'
  ax.set(xlabel='training FLOPs $C$', ylabel='loss (nats per token)', title=title)
  ax.legend(frameon=False, fontsize=8)
  return figure


def _by_the_rule(ax, a: Analysis, flops):
  """The forecasts of `a.rule`, with a band that includes the scatter of a new run; nothing if it has none."""
  try:
    forecasts = [a.forecast(float(c)) for c in flops]
  except NoForecast:
    return
  low = [f.loss_low for f in forecasts]
  high = [f.loss_high for f in forecasts]
  ax.fill_between(flops, low, high, color=INK, alpha=0.1, linewidth=0, label=f'its {BAND}')
  ax.plot(
    flops, [f.loss for f in forecasts], color=INK, linewidth=1.2, label=f'by the rule: {a.rule}'
  )


def residuals(a: Analysis):
  """ln(fitted / observed) against N, D, C and D / N."""
  figure, axes = new_figure(2, 2, size=(4.6, 3.1), sharey=True)
  if a.approach3 is None:
    return _says(figure, axes[0], a.refusals.get('approach 3', 'no law was fitted'))
  r = a.approach3.residuals
  rows = a.rows
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
  log = a.approach3.problem.residuals == 'log'
  unit = 'fitted over observed, %' if log else '100 (fitted - observed)'
  for ax in axes[::2]:
    ax.set_ylabel(unit)
  figure.colorbar(dots, ax=list(axes), label='training FLOPs $C$', shrink=0.8)
  return figure


def bootstrap(a: Analysis, most: int = 1000):
  """Clouds of the bootstrapped parameters, in pairs, with the fit itself in red; at most `most` dots each."""
  if a.approach3 is None:
    figure, ax = _figure_of(None)
    return _says(figure, ax, a.refusals.get('approach 3', 'no law was fitted'))
  values = a.bootstrap.parameters
  # The pairs that trade off in Chinchilla; of another law the first four.
  usual = (('alpha', 'beta'), ('A', 'alpha'), ('B', 'beta'), ('E', 'alpha'))
  pairs = [pair for pair in usual if set(pair) <= set(values)]
  pairs = pairs or list(itertools.combinations(a.approach3.problem.free, 2))[:4]
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


def _figure_of(ax):
  """(the figure of the axes, the axes); new ones for None."""
  if ax is not None:
    return ax.figure, ax
  figure, (ax,) = new_figure(size=(6.0, 4.4))
  return figure, ax


def _span(values, pad):
  """120 values on a logarithmic scale from a factor `pad` below the smallest to as far above the largest."""
  return np.geomspace(values.min() / pad, values.max() * pad, 120)


def _slope_label(exponents, name, approach):
  """'approach 3: a = 0.5 [0.4, 0.6]'."""
  key = f'{name}, approach {approach}'
  if key not in exponents:
    raise LawError(f'{key} was not fitted.')
  value, low, high = exponents[key]
  spread = f' [{low:.2f}, {high:.2f}]' if np.isfinite(low) else ''
  return f'approach {approach}: ${name}$ = {value:.3f}{spread}'


def _math(name: str) -> str:
  """A parameter's name in matplotlib's mathematics: alpha is the letter, and long names stay as they are."""
  if name in GREEK:
    return rf'$\{name}$'
  return name if '_' in name or len(name) > 2 else f'${name}$'


def _says(figure, ax, why):
  """The figure with a sentence in place of what it cannot show."""
  for other in figure.axes:
    if other is not ax and len(figure.axes) > 2:
      other.set_axis_off()
  ax.set_axis_off()
  sentence = '\n'.join(textwrap.wrap(why, 60))
  middle = {'ha': 'center', 'va': 'center', 'transform': ax.transAxes}
  ax.text(0.5, 0.5, sentence, fontsize=9, **middle)
  return figure
