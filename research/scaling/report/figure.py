"""The style of all figures: colours, axes and logarithmic ticks; and the data of a figure as CSV."""

import csv
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

INK, GRID, ACCENT, SECOND = '#222222', '#dddddd', '#c0392b', '#1f6f8b'
MAP = 'viridis'
FEW = 7  # shades of one map that the eye can tell apart
MARKERS = 'os^Dv'


def new_figure(columns=1, rows=1, size=(5.2, 3.9), **kwargs):
  """(a figure, its axes [columns * rows]); `size` in inches is that of each panel.

  It has a canvas of its own: pyplot would keep every figure in a global list.
  """
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
  """Makes an axis logarithmic, with labelled ticks even where it spans less than a decade.

  Args:
    axis: 'x' or 'y'.
    plain: label with plain numbers, as for losses.
  """
  getattr(ax, f'set_{axis}scale')('log')
  low, high = sorted(getattr(ax, f'get_{axis}lim')())
  line = getattr(ax, f'{axis}axis')
  if plain:
    narrow = high / low < 8
    locator = MaxNLocator(7) if narrow else LogLocator(subs=(1.0, 3.0), numticks=12)
    line.set_major_locator(locator)
    line.set_minor_locator(NullLocator())
    line.set_major_formatter('{x:.4g}')
    return
  subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
  line.set_major_locator(LogLocator(subs=subs, numticks=12))
  line.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
  line.set_minor_formatter('')


def budget_colors(flops):
  """A colour for each budget in the order of size: shades of one map, or for over seven budgets all hues."""
  from matplotlib import colormaps

  order = np.argsort(np.argsort(np.asarray(flops, np.float64), kind='stable'))
  place = order / max(len(order) - 1, 1)
  name = MAP if len(order) <= FEW else 'turbo'
  return colormaps[name](0.05 + 0.85 * place)


def budget_markers(flops) -> list[str]:
  """A marker for each budget. Neighbours differ in shape where there are too many colours to tell apart."""
  few = len(flops) <= FEW
  return ['o' if few else MARKERS[i % len(MARKERS)] for i in range(len(flops))]


def data(figure) -> str:
  """The data of a figure as CSV: panel, series, x, y, and for a band the upper y.

  It leaves out lines that only guide the eye, and contours, which follow from the fitted law.
  """
  out = io.StringIO()
  lines = csv.writer(out)
  lines.writerow(('panel', 'series', 'x', 'y', 'y_high'))
  for ax in figure.axes:
    panel = ax.get_title() or ax.get_xlabel()
    for line in ax.get_lines():
      # A line in other coordinates, as axhline draws it, has no data.
      if len(line.get_xdata()) > 0 and line.get_transform() == ax.transData:
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
          lines.writerow((panel, _series(line), float(x), float(y), ''))
    for part in ax.collections:
      if isinstance(part, FillBetweenPolyCollection):
        _write_band(lines, panel, part)
      elif isinstance(part, PathCollection):
        for x, y in part.get_offsets():
          lines.writerow((panel, _series(part), float(x), float(y), ''))
  return out.getvalue()


def _write_band(lines, panel: str, part) -> None:
  """Writes the lower and the upper edge of a band, from the outline that matplotlib keeps of it."""
  low = {}
  high = {}
  for x, y in part.get_paths()[0].vertices:
    low[x] = min(y, low.get(x, y))
    high[x] = max(y, high.get(x, y))
  for x in sorted(low):
    lines.writerow((panel, _series(part), float(x), float(low[x]), float(high[x])))


def _series(artist) -> str:
  """The label of an artist; '' for one that matplotlib made up, which begins with an underscore."""
  label = str(artist.get_label())
  return '' if label.startswith('_') else label
