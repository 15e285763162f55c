"""The figure of emergence: accuracy, nats of the answer, forecast and outcome against compute."""

import pathlib

import sums

from research.scaling.report.figure import MARKERS, log_scale, new_figure

TITLES = {'direct': 'the answer at once', 'chain': 'the columns, then the answer'}
LABELS = {'accuracy': 'accuracy (all of it right)', 'nats': 'nats of the right completion'}


def draw(rows: list[dict], forecast: dict, path: pathlib.Path) -> None:
  """Panels: the hard metric above the smooth one, a column a mode.

  Args:
    rows: of all sizes, a row for each run, mode and number of shots.
    forecast: as `forecasts.make` returns it.
  """
  drawn, panels = new_figure(2, 2, size=(5.4, 3.5), sharex=True)
  places = [(metric, mode) for metric in LABELS for mode in sums.MODES]
  for axes, (metric, mode) in zip(panels, places, strict=True):
    for i, shots in enumerate(sums.SHOTS):
      _condition(axes, rows, forecast, (mode, shots, metric), i)
    log_scale(axes, 'x')
    if metric == 'accuracy':
      axes.axhline(sums.GUESS, color='#888888', linewidth=0.8, linestyle=':')
      axes.set_ylim(-0.03, 1.03)
      axes.set_title(TITLES[mode], fontsize=10)
    else:
      log_scale(axes, 'y', plain=True)
      axes.set_xlabel('training FLOPs')
    if mode == sums.MODES[0]:
      axes.set_ylabel(LABELS[metric])
  panels[0].legend(frameon=False, fontsize=8, loc='upper left')
  drawn.savefig(path, dpi=120)


def _condition(axes, rows: list[dict], forecast: dict, condition: tuple, i: int) -> None:
  """One number of shots in a panel: filled marks were fitted to, open ones tested, small ones more seeds."""
  mode, shots, metric = condition
  color = color_of(i)
  for stage, face, size in (('fit', color, 5), ('test', 'white', 5), ('again', 'white', 3)):
    chosen = [
      row for row in rows if (row['mode'], row['shots'], row['stage']) == (mode, shots, stage)
    ]
    axes.plot(
      [row['flops'] for row in chosen], [row[metric] for row in chosen], MARKERS[i], color=color,
      markerfacecolor=face, markersize=size, linestyle='none',
      label=f'shots: {shots}' if stage == 'fit' else None,
    )  # fmt: skip
  curve = forecast['curves'].get(f'{mode}, {shots} shots', [])
  column = 1 if metric == 'nats' else 2
  axes.plot([p[0] for p in curve], [p[column] for p in curve], color=color, linewidth=1)
  _forecasts(axes, forecast, condition, i)


def _forecasts(axes, forecast: dict, condition: tuple, i: int) -> None:
  """The forecasts with their intervals, right of the marks of the outcome; further right for more shots."""
  mode, shots, metric = condition
  label = 'forecast of the open marks, 90%' if i == 0 else None
  for name, value in forecast['forecasts'].items():
    of_this = name.startswith(f'{mode}, {shots} shots') and name.endswith(f': {metric}')
    if not of_this or value['value'] is None:
      continue
    place = value['at']['flops'] * 1.06 ** (i + 1)
    below = max(0, value['value'] - value['low'])
    above = max(0, value['high'] - value['value'])
    axes.errorbar(
      [place], [value['value']], [[below], [above]], color=color_of(i), capsize=3, label=label
    )
    label = None


def color_of(i: int) -> str:
  return f'C{i}'
