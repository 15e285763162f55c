"""How often the quickstart's forecast holds what comes out: twenty quickstarts, each from seeds of its own.

    python -m research.sweep --gin_file=experiments/quickstart/repeats.gin --workdir=runs/repeats
    python experiments/quickstart/repeats.py --results=runs/repeats/results.csv

The sweep trains every size of the quickstart from twenty seeds. This script makes twenty quickstarts of its
rows. Each has the runs of its own seed and, as the quickstart does, a second run of every size at the
largest budget: that of the seed ten further on. So two quickstarts share their runs at the largest budget. Each
forecasts the loss of the larger run by the default rule, and is compared with that run from its own seed, and
with the mean over all seeds.

Writes repeats.csv (a row for each quickstart) and repeats.png beside this file.
"""

import argparse
import csv
import pathlib

import numpy as np

from research.scaling import prior_fit, rows, tables
from research.scaling.report import figure

HERE = pathlib.Path(__file__).resolve().parent
LEVELS = (0.5, 0.8, 0.9)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--results', required=True, help='results.csv of the sweep of repeats.gin')
  flags = parser.parse_args()
  table = tables.read(flags.results).rows
  fits = [row for row in table if row['role'] == 'fit']
  tests = {int(row['seed']): row for row in table if row['role'] == 'forecast'}
  repeats = [forecast(of_seed(fits, seed, len(tests)), seed, tests[seed]) for seed in sorted(tests)]
  write(repeats)
  mean = float(np.mean([repeat['outcome'] for repeat in repeats]))
  tell(repeats, mean)
  draw(repeats, mean)


def of_seed(fits: list[dict], seed: int, seeds: int) -> list[dict]:
  """The rows of one quickstart: of its seed, and of a second seed at the largest budget."""
  largest = max(float(row['budget']) for row in fits)
  second = (seed + seeds // 2) % seeds
  return [
    row
    for row in fits
    if int(row['seed']) == seed or (int(row['seed']) == second and float(row['budget']) == largest)
  ]


def forecast(fits: list[dict], seed: int, test: dict) -> dict:
  """The forecast of the run `test` from the rows `fits`, with its intervals and what came out."""
  seen = rows.observe(fits)
  target = rows.observe([test])
  fitted = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior_fit.LEARNED, seen.flops)
  point = target.params, target.tokens
  expected = float(np.exp(fitted.predict(*point, target.flops)[0][0]))
  repeat = {'seed': seed, 'runs': len(seen), 'outcome': float(target.loss[0]), 'forecast': expected}
  for level in LEVELS:
    low, high = fitted.interval(*point, level, target.flops)
    repeat |= {f'low_{level:.0%}': float(low[0]), f'high_{level:.0%}': float(high[0])}
  return repeat


def write(repeats: list[dict]) -> None:
  with (HERE / 'repeats.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, list(repeats[0]))
    writer.writeheader()
    writer.writerows(repeats)


def tell(repeats: list[dict], mean: float) -> None:
  """Prints the scatter, the errors, and how many intervals hold the outcome."""
  forecasts = np.array([repeat['forecast'] for repeat in repeats])
  outcomes = np.array([repeat['outcome'] for repeat in repeats])
  errors = forecasts / outcomes - 1
  print(
    f'{len(repeats)} quickstarts: forecast {forecasts.mean():.4f} on average, standard deviation '
    f'{forecasts.std(ddof=1):.4f}; outcome {mean:.4f}, standard deviation {outcomes.std(ddof=1):.4f}'
  )
  print(
    f'forecast over outcome: {errors.mean():+.2%} on average, {errors.min():+.2%} to {errors.max():+.2%}'
  )
  for level in LEVELS:
    low = np.array([repeat[f'low_{level:.0%}'] for repeat in repeats])
    high = np.array([repeat[f'high_{level:.0%}'] for repeat in repeats])
    inside = int(np.sum((low <= outcomes) & (outcomes <= high)))
    of_mean = int(np.sum((low <= mean) & (mean <= high)))
    print(
      f'{level:.0%} intervals: {inside} of {len(repeats)} hold the outcome of their own seed, '
      f'{of_mean} the mean of all outcomes'
    )


def draw(repeats: list[dict], mean: float) -> None:
  """Every forecast with its 90% interval, and what came out."""
  picture, (ax,) = figure.new_figure(size=(6.4, 3.6))
  for repeat in repeats:
    loss = repeat['forecast']
    span = [[loss - repeat['low_90%']], [repeat['high_90%'] - loss]]
    ax.errorbar(
      repeat['seed'], loss, span, fmt='o', color=figure.ACCENT, markersize=4, capsize=2, linewidth=1
    )
    ax.plot(repeat['seed'], repeat['outcome'], marker='x', color=figure.SECOND, markersize=5)
  ax.axhline(mean, color=figure.INK, linewidth=0.9, linestyle='--')
  ax.set_xticks(range(0, len(repeats), 5))
  ax.set(
    xlabel='seed of the quickstart',
    ylabel='loss (nats per byte)',
    title='Forecasts with 90% intervals; crosses: the outcomes; dashed: their mean',
  )
  picture.savefig(HERE / 'repeats.png', dpi=130)


if __name__ == '__main__':
  main()
