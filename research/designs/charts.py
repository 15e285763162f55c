"""Figures of the designs whose answer is no law of N and D. Each function returns a matplotlib Figure."""

from collections.abc import Mapping

import numpy as np

from research.scaling.report.charts import LOSS, colors_of
from research.scaling.report.figure import ACCENT, INK, MAP, SECOND, log_scale, new_figure


def rates(best_of: Mapping[str, dict], line: tuple[float, float, float] | None):
  """Loss against learning rate for every size, and the best rates against N.

  Args:
    best_of: {size: its `rates.best_rate`}.
    line: (value, centre, exponent) of the best rate = value (N / centre)^exponent, if it was fitted.
  """
  figure, (curves, law) = new_figure(2)
  highest = 0.0
  for (name, size), color in zip(best_of.items(), colors_of(best_of).values(), strict=True):
    for batch, points in size['points'].items():
      x, y = np.array(points).T
      best = batch == size['batch']
      curves.plot(x, y - size['loss'], 'o', color=color, markersize=4, alpha=1 if best else 0.3)
      highest = max(highest, np.median(y) - size['loss'])
    curves.plot([], [], 'o-', color=color, markersize=4, label=f'{name}, batch {size["batch"]}')
    if size['parabola'] is None:
      continue
    x = np.geomspace(*size['fitted'], 60)
    y = np.polyval(size['parabola'], np.log(x)) - size['loss']
    curves.plot(x, y, '-', color=color, linewidth=1.2)
    star = {'color': ACCENT, 'markersize': 11, 'markeredgecolor': 'white'}
    curves.plot(size['rate'], 0.0, '*', **star)
    law.plot(size['params'], size['rate'], '*', **star)
  # A diverged run would hide the others, so it lies above the frame.
  curves.set_ylim(top=min(curves.get_ylim()[1], max(4 * highest, 1e-3)))
  if line:
    value, centre, exponent = line
    sizes = [size['params'] for size in best_of.values()]
    n = np.geomspace(min(sizes), max(sizes), 20)
    label = f'{value:.3g} (N / {centre:.3g})^{exponent:.3f}'
    law.plot(n, value * (n / centre) ** exponent, color=SECOND, label=label)
    law.legend(frameon=False, fontsize=8)
  several = any(len(size['points']) > 1 for size in best_of.values())
  title = 'Every size' + ('; faint: other batch sizes' if several else '')
  curves.set(
    xlabel='learning rate', ylabel="loss over the size's best (nats per token)", title=title
  )
  law.set(xlabel='parameters $N$', ylabel='best learning rate', title='The best rate of every size')
  curves.legend(fontsize=7, frameon=False)
  log_scale(curves, 'x')
  if law.lines:
    log_scale(law, 'x')
    log_scale(law, 'y')
  return figure


def shapes(losses: Mapping[tuple[int, int], float]):
  """Losses of (width, depth) as a map, the lowest marked."""
  figure, (ax,) = new_figure(size=(6.0, 4.2))
  widths = sorted({width for width, _ in losses})
  depths = sorted({depth for _, depth in losses})
  cells = np.array([[losses.get((w, d), np.nan) for w in widths] for d in depths])
  picture = ax.imshow(cells, cmap=MAP, origin='lower', aspect='auto')
  best = min(losses, key=losses.get)
  for (width, depth), loss in losses.items():
    cell = widths.index(width), depths.index(depth)
    weight = 'bold' if (width, depth) == best else 'normal'
    color = 'white' if loss < (np.nanmin(cells) + np.nanmax(cells)) / 2 else INK
    ax.text(*cell, f'{loss:.4f}', ha='center', va='center', color=color, weight=weight, fontsize=9)
  x = widths.index(best[0])
  y = depths.index(best[1])
  from matplotlib.patches import Rectangle

  ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ACCENT, linewidth=2.5))
  ax.grid(False)
  ax.set_xticks(range(len(widths)), widths)
  ax.set_yticks(range(len(depths)), depths)
  ax.set(xlabel='width', ylabel='layers', title='Final loss; the lowest is framed')
  figure.colorbar(picture, ax=ax, label=LOSS)
  return figure


def differences(changes: Mapping[str, Mapping[str, tuple[float, float]]]):
  """Bars of the changes: {size: {variant: (loss minus the base's, its standard error)}}."""
  variants = max(map(len, changes.values()))
  figure, (ax,) = new_figure(size=(7.0, 1.2 + 0.35 * variants * len(changes)))
  ticks = []
  labels = []
  for name, color in colors_of(changes).items():
    for variant, (change, error) in changes[name].items():
      ticks.append(-len(ticks))
      labels.append(f'{name}  {variant}')
      error = None if np.isnan(error) else error
      ax.barh(ticks[-1], change, xerr=error, color=color, ecolor=INK, capsize=3, height=0.7)
  ax.axvline(0, color=INK, linewidth=0.8)
  ax.set_yticks(ticks, labels, fontsize=8)
  ax.set(xlabel='loss over the base (nats per token)', title='To the left is better')
  return figure


def epochs(rows: Mapping[str, np.ndarray], predict=None):
  """Loss against epochs: a panel for every size, a colour for every number of unique tokens.

  Args:
    rows: arrays params, tokens, unique_tokens, loss [runs].
    predict: (params, tokens, unique_tokens) -> loss, of the fitted law.
  """
  n = np.unique(rows['params'])
  columns = min(len(n), 3)
  figure, axes = new_figure(columns, -(-len(n) // columns), size=(4.0, 3.3), sharey=True)
  unique = np.round(rows['unique_tokens'])
  colors = colors_of(np.unique(unique))
  for ax, params in zip(axes, n, strict=False):
    for u, color in colors.items():
      mine = (rows['params'] == params) & (unique == u)
      if not mine.any():
        continue
      x = rows['tokens'][mine] / u
      order = np.argsort(x)
      style = 'o' if predict else 'o-'
      ax.plot(x[order], rows['loss'][mine][order], style, color=color, markersize=4)
      ax.plot([], [], 'o-', color=color, markersize=4, label=f'{u:.3g}')
      if predict:
        grid = np.geomspace(x.min(), x.max(), 60)
        ax.plot(grid, predict(params, grid * u, u), '-', color=color, linewidth=1.2)
        fresh = predict(params, grid * u, grid * u)
        ax.plot(grid, fresh, ':', color=color, linewidth=1)
    log_scale(ax, 'x')
    ax.xaxis.set_major_formatter('{x:g}')
    ax.set(xlabel='epochs', title=f'N = {params:.3g}')
  for ax in axes[len(n) :]:
    ax.set_axis_off()
  axes[0].set_ylabel(LOSS)
  axes[0].legend(title='unique tokens', fontsize=7, title_fontsize=8, frameon=False)
  return figure


def transfers(curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]):
  """Loss against tokens of the fine-tuning text: a panel for every size, a line for every start.

  Args:
    curves: {size: {start: [(tokens, loss)]}}.
  """
  columns = min(len(curves), 3)
  figure, axes = new_figure(columns, -(-len(curves) // columns), size=(4.2, 3.4), sharey=True)
  colors = colors_of([start for curve in curves.values() for start in curve])
  for ax, (size, of_start) in zip(axes, curves.items(), strict=False):
    for start, points in of_start.items():
      x, y = np.array(sorted(points)).T
      ax.plot(x, y, 'o-', color=colors[start], markersize=4, linewidth=1.2, label=start)
    log_scale(ax, 'x')
    ax.set(xlabel='tokens of the fine-tuning text', title=size)
  for ax in axes[len(curves) :]:
    ax.set_axis_off()
  axes[0].set_ylabel(LOSS)
  axes[0].legend(fontsize=7, frameon=False)
  return figure
