"""Figures of training curves and of sizes. Each function returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from research.scaling.analysis import Analysis
from research.scaling.report.figure import ACCENT, MAP, SECOND, log_scale, new_figure
from research.scaling.rows import Observations

LOSS = 'loss (nats per token)'


def colors_of(keys: Sequence) -> dict:
  """A colour of the map for each key, in their order."""
  from matplotlib import colormaps

  keys = list(dict.fromkeys(keys))
  return dict(zip(keys, colormaps[MAP](np.linspace(0.05, 0.85, len(keys))), strict=True))


def sizes(observations: Observations, a: Analysis | None = None):
  """Final losses of each size against D, with the fitted law if there is one, and against C."""
  figure, (by_tokens, by_flops) = new_figure(2)
  law = a is not None and a.approach3 is not None
  for n, color in colors_of(np.unique(observations.params)).items():
    rows = observations.take(observations.params == n)
    order = np.argsort(rows.tokens)
    style = {'color': color, 'markersize': 4, 'linewidth': 0.9}
    by_tokens.plot(rows.tokens[order], rows.loss[order], 'o' if law else 'o-', **style)
    by_flops.plot(rows.flops[order], rows.loss[order], 'o-', label=f'{n:.3g}', **style)
    if law:
      d = np.geomspace(rows.tokens.min(), rows.tokens.max(), 60)
      by_tokens.plot(d, a.predict(n, d), '-', color=color, linewidth=1.2)
  if a is not None and a.approach1 is not None:
    (lowest,) = a.approach1.profiles
    c = a.cost.flops(lowest.params, lowest.tokens)
    by_flops.plot(c, lowest.loss, '.', color=ACCENT, markersize=3, label='lowest, approach 1')
  title = 'Every size; lines: the fitted law' if law else 'Every size'
  by_tokens.set(xlabel='training tokens $D$', ylabel=LOSS, title=title)
  by_flops.set(xlabel='training FLOPs $C$', title='The same by compute')
  by_flops.legend(title='$N$', fontsize=7, title_fontsize=8, frameon=False)
  for ax in (by_tokens, by_flops):
    log_scale(ax, 'x')
    log_scale(ax, 'y', plain=True)
  return figure


def curves(runs: Mapping[str, np.ndarray], params: Mapping[str, float] | None = None):
  """Training curves, loss against tokens, coloured by N where it is known.

  Args:
    runs: the points of each run, [points, 2] of (tokens, loss).
    params: N of each run.
  """
  from matplotlib import colormaps

  figure, (ax,) = new_figure(size=(6.0, 4.0))
  sizes = [params[r] for r in runs if params and r in params]
  norm = LogNorm(min(sizes), max(sizes)) if sizes and min(sizes) < max(sizes) else Normalize()
  for run, points in runs.items():
    points = np.asarray(points, np.float64)
    color = colormaps[MAP](norm(params[run])) if params and run in params else SECOND
    ax.plot(points[:, 0], points[:, 1], color=color, linewidth=0.9)
  log_scale(ax, 'x')
  ax.set(
    xlabel='tokens', ylabel='loss (nats per token)', title='Training curves, darker is smaller'
  )
  return figure
