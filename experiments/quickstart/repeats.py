"""How often the outcome of a quickstart falls into its interval: twenty quickstarts with seeds of their own.

    python -m research.sweep --gin_file=experiments/quickstart/repeats.gin --workdir=runs/repeats
    python experiments/quickstart/repeats.py --results=runs/repeats/results.csv

repeats_rows.csv has the rows of 2026-11-27: `--results=experiments/quickstart/repeats_rows.csv` trains nothing.

The rows of seeds i and i + 20 are the i-th quickstart: 25 runs of the fit, and two of the forecast, whose mean
is the outcome. Each forecast is made from its 25 rows alone, by the default rule. Writes repeats.csv and
repeats.png beside this file.
"""

import argparse
import csv
import json
import pathlib

import numpy as np

from research.scaling import prior_fit, rows, tables
from research.scaling.report import figure

HERE = pathlib.Path(__file__).resolve().parent
REPEATS = 20
LEVEL = 0.9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--results', required=True, help='results.csv of the sweep of repeats.gin')
  flags = parser.parse_args()
  table = tables.read(flags.results).rows
  repeats = [repeat(table, index) for index in range(REPEATS)]
  with (HERE / 'repeats.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, list(repeats[0]))
    writer.writeheader()
    writer.writerows(repeats)
  draw(repeats)
  tell(repeats)


def repeat(table: list[dict], index: int) -> dict:
  """The forecast from the rows of one quickstart, and what its two larger runs came to."""
  own = [row for row in table if int(row['seed']) % REPEATS == index]
  tested = [row for row in own if row['role'] == 'forecast']
  outcomes = [float(row['loss']) for row in tested]
  seen = rows.observe([row for row in own if row['role'] == 'fit'])
  fitted = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior_fit.LEARNED, seen.flops)
  larger = rows.observe(tested, role='forecast')
  point = larger.params[0], larger.tokens[0]
  flops = larger.flops[0]
  middle, _ = fitted.predict(*point, flops)
  low, high = fitted.interval(*point, LEVEL, flops)
  outcome = float(np.mean(outcomes))
  forecast = float(np.exp(middle[0]))
  return {
    'repeat': index,
    'rows': len(seen),
    'forecast': f'{forecast:.4f}',
    'low': f'{low[0]:.4f}',
    'high': f'{high[0]:.4f}',
    'outcome': f'{outcome:.4f}',
    'outcomes': json.dumps([round(loss, 4) for loss in outcomes]),
    'error': f'{forecast / outcome - 1:+.4f}',
    'inside': bool(low[0] <= outcome <= high[0]),
  }


def tell(repeats: list[dict]) -> None:
  errors = np.array([float(row['error']) for row in repeats])
  inside = sum(row['inside'] for row in repeats)
  singles = [
    float(row['low']) <= loss <= float(row['high'])
    for row in repeats
    for loss in json.loads(row['outcomes'])
  ]
  widths = [float(row['high']) / float(row['low']) - 1 for row in repeats]
  print(f'the outcome is inside {inside} of {len(repeats)} intervals of {LEVEL:.0%}')
  print(f'single runs: inside {sum(singles)} of {len(singles)}')
  print(
    f'error of the loss: mean {errors.mean():+.2%}, median of its size '
    f'{np.median(np.abs(errors)):.2%}, largest {np.abs(errors).max():.2%}; an interval is '
    f'{np.median(widths):.1%} wide'
  )


def draw(repeats: list[dict]) -> None:
  picture, (ax,) = figure.new_figure(size=(6.0, 3.6))
  for row in repeats:
    loss, low, high = (float(row[name]) for name in ('forecast', 'low', 'high'))
    span = [[loss - low], [high - loss]]
    ax.errorbar(
      row['repeat'], loss, span, fmt='o', color=figure.SECOND, markersize=4, capsize=2, linewidth=1
    )
    ax.plot(row['repeat'], float(row['outcome']), 'D', color=figure.ACCENT, markersize=5)
  ax.set_xticks(range(0, REPEATS, 5))
  ax.set(
    xlabel='quickstart, by its seed',
    ylabel='loss (nats per byte)',
    title='Forecasts with 90% intervals, and outcomes (diamonds)',
  )
  picture.savefig(HERE / 'repeats.png', dpi=130)


if __name__ == '__main__':
  main()
