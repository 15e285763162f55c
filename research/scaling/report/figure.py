"""The style of every figure: its colours, its axes, its logarithmic ticks."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

INK, GRID, ACCENT, SECOND = '#222222', '#dddddd', '#c0392b', '#1f6f8b'
MAP = 'viridis'


def new_figure(columns=1, rows=1, size=(5.2, 3.9), **kwargs):
  figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
  for ax in axes:
    _style(ax)
  return figure, axes


def _style(ax):
  ax.grid(True, color=GRID, linewidth=0.6)
  ax.set_axisbelow(True)
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)


def log_scale(ax, axis: str, plain: bool = False):
  """A logarithmic axis that labels its ticks even where it spans less than a decade; `plain` for losses."""
  getattr(ax, f'set_{axis}scale')('log')
  low, high = sorted(getattr(ax, f'get_{axis}lim')())
  narrow = high / low < 30
  subs = (1.0, 2.0, 5.0) if narrow else (1.0,)
  line = getattr(ax, f'{axis}axis')
  line.set_major_locator(LogLocator(subs=subs, numticks=12))
  if plain:
    line.set_major_locator(MaxNLocator(7))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(lambda v, _: f'{v:.4g}')
    return
  line.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
  line.set_minor_formatter('')


def budget_colors(flops):
  from matplotlib import colormaps

  flops = np.asarray(flops, np.float64)
  span = np.ptp(np.log(flops)) or 1.0
  return colormaps[MAP](0.05 + 0.85 * (np.log(flops) - np.log(flops).min()) / span)
