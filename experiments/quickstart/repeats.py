"""How much the quickstart's forecast depends on the seeds: its rows with their scatter drawn again.

    python experiments/quickstart/repeats.py

Nothing is trained. Each repeat draws the twenty-five losses anew around the fitted law, from the law's own
residuals, and forecasts the larger run by the default rule. The forecasts are compared with the two runs (seeds
0 and 1) of that size. The first line is the forecast from the rows as they are.
"""

import json
import pathlib

import numpy as np

from research.scaling import prior_fit, rows, tables
from research.scaling.report import figure

HERE = pathlib.Path(__file__).resolve().parent
REPEATS = 20


def main() -> None:
  table = tables.read(HERE / 'results.csv').rows
  seen = rows.observe(table)
  outcomes = np.array([float(row['loss']) for row in table if row['role'] == 'forecast'])
  target = json.loads((HERE / 'forecast.json').read_text())['forecast']
  point = target['params'], target['tokens'], 0.9, target['flops']
  fitted = fit(seen, np.log(seen.loss))
  forecasts = [forecast(fitted, point)]
  loss, low, high = forecasts[0]
  print(f'from the rows as they are: {loss:.4f} [{low:.4f}, {high:.4f}]; outcomes {outcomes}')
  middle, _ = fitted.predict(seen.params, seen.tokens, seen.flops)
  residuals = np.log(seen.loss) - middle
  residuals *= np.sqrt(len(seen) / (len(seen) - 6))  # six parameters took some of the scatter
  rng = np.random.default_rng(0)
  for _ in range(REPEATS):
    ln_loss = middle + rng.choice(residuals, len(seen))
    forecasts.append(forecast(fit(seen, ln_loss), point))
  loss, low, high = np.array(forecasts[1:]).T
  inside = (low <= outcomes[:, None]) & (outcomes[:, None] <= high)
  print(f'{REPEATS} repeats: {loss.mean():.4f}, standard deviation {loss.std(ddof=1):.4f}')
  print(f'the outcome of each seed is inside {inside.sum(1)} of {REPEATS} intervals')
  draw(np.array(forecasts), outcomes)


def fit(seen, ln_loss):
  return prior_fit.fit(seen.params, seen.tokens, np.exp(ln_loss), prior_fit.LEARNED, seen.flops)


def forecast(fitted, point) -> tuple[float, float, float]:
  """(loss, low, high) at a point (N, D, level of the interval, C)."""
  params, tokens, level, flops = point
  low, high = fitted.interval(params, tokens, level, flops)
  return float(np.exp(fitted.predict(params, tokens, flops)[0][0])), float(low[0]), float(high[0])


def draw(forecasts, outcomes) -> None:
  picture, (ax,) = figure.new_figure(size=(6.0, 3.6))
  loss, low, high = forecasts.T
  color = [figure.ACCENT, *[figure.SECOND] * REPEATS]
  for k in range(len(forecasts)):
    span = [[loss[k] - low[k]], [high[k] - loss[k]]]
    ax.errorbar(k, loss[k], span, fmt='o', color=color[k], markersize=4, capsize=2, linewidth=1)
  for outcome in outcomes:
    ax.axhline(outcome, color=figure.INK, linewidth=0.9, linestyle='--')
  ax.set_xticks(range(0, REPEATS + 1, 5))
  ax.set(
    xlabel='0: the rows as they are; 1 to 20: their scatter drawn again',
    ylabel='loss (nats per byte)',
    title='Forecasts with 90% intervals; dashed: the two runs',
  )
  picture.savefig(HERE / 'repeats.png', dpi=130)


if __name__ == '__main__':
  main()
