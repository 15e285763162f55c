"""Kaplan's exponent, and what each step of Porian et al. 2024 (arXiv:2406.19146) makes of it, on our own runs.

    for name in constant warmup cosine; do
      python -m research.sweep --gin_file=experiments/kaplan/$name.gin --workdir=runs/kaplan/$name
    done
    python experiments/kaplan/compare.py --runs=runs/kaplan

The runs at a constant rate are read off on their way: a size's validation loss at D is on the line through its
evaluations, ln loss against ln D. Every step then fits N* ~ C^a through the isoFLOP minima.
"""

import argparse
import csv
import json
import math
import pathlib

import numpy as np

from research.scaling import Columns, NoForecast, fit_results
from research.sweeps.findings import Refused

HERE = pathlib.Path(__file__).resolve().parent
PAIRS = {'params_non_embedding': 'flops_6n_non_embedding', 'params_with_head': 'flops_6n_with_head'}
# Porian et al. 2024, table 1: a on RefinedWeb.
PUBLISHED = (0.835, 0.706, 0.602, 0.571, 0.497)


def on_the_way(folder: pathlib.Path, params: str) -> list[dict]:
  """Rows at shared budgets from the curves of runs that were evaluated as they trained."""
  runs = []
  for path in sorted(folder.glob('runs/*/run.json')):
    row = json.loads(path.read_text())
    lines = map(json.loads, (path.parent / 'metrics.jsonl').read_text().splitlines())
    seen = {x['tokens']: x['validation/loss'] for x in lines if 'validation/loss' in x}
    tokens, losses = (np.log(v) for v in zip(*sorted(seen.items()), strict=True))
    runs.append((path.parent.name, row, row[PAIRS[params]] / row['tokens'], tokens, losses))
  last = min(per_token * math.exp(tokens[-1]) for _, _, per_token, tokens, _ in runs)
  rows = []
  for budget in last / 2.0 ** np.arange(6):
    for name, row, per_token, tokens, losses in runs:
      at = math.log(budget / per_token)
      if tokens[0] <= at <= tokens[-1] * (1 + 1e-6):
        loss = math.exp(np.interp(at, tokens, losses))
        rows.append(_row(f'{name}@{budget:.2e}', row[params], math.exp(at), budget, loss))
  return rows


def at_the_end(path: pathlib.Path, params: str) -> list[dict]:
  """Rows of runs that each had a schedule of its own."""
  with path.open() as file:
    rows = [r for r in csv.DictReader(file) if r['role'] == 'fit' and r['loss']]
  value = lambda r, k: float(r[k])
  return [
    _row(r['run'], value(r, params), value(r, 'tokens'), value(r, 'budget'), value(r, 'loss'))
    for r in rows
  ]


def _row(run, params, tokens, budget, loss) -> dict:
  return {
    'run': run,
    'params': params,
    'tokens': tokens,
    'flops': budget,
    'budget': budget,
    'loss': loss,
  }


def exponent(rows: list[dict]):
  """(a, low, high, budgets with a minimum) of approach 2, or why there is none."""
  columns = Columns(params='params', tokens='tokens', flops='flops', loss='loss')
  try:
    analysis = fit_results(rows, columns=columns, noise=0.01, conventions=False)
  except NoForecast as error:
    return Refused(str(error))
  if analysis.approach2 is None:
    return Refused(analysis.refusals['approach 2'])
  two = analysis.approach2
  return two.params.exponent, *two.interval('a'), len(two.used)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--runs', type=pathlib.Path, default=pathlib.Path('runs/kaplan'))
  parser.add_argument(
    '--tuned', type=pathlib.Path, default=HERE.parent / 'isoflop_decoder/results.csv'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, help='where to write the rows of every step (CSV)'
  )
  flags = parser.parse_args()
  without, whole = PAIRS
  steps = {
    "Kaplan's way": on_the_way(flags.runs / 'constant', without),
    'the head counted': on_the_way(flags.runs / 'constant', whole),
    'a short warm-up': on_the_way(flags.runs / 'warmup', whole),
    'a cosine to each horizon': at_the_end(flags.runs / 'cosine/results.csv', whole),
    'rates by size': at_the_end(flags.tuned, whole),
  }
  print(f'{"step":26}{"a":>7}  90% interval    budgets  published')
  for (name, rows), published in zip(steps.items(), PUBLISHED, strict=True):
    result = exponent(rows)
    if isinstance(result, Refused):
      print(f'{name:26}{result.reason}')
    else:
      a, low, high, budgets = result
      print(f'{name:26}{a:7.3f}  [{low:.3f}, {high:.3f}]  {budgets:7}  {published:9.3f}')
  if flags.out:
    with flags.out.open('w', newline='') as file:
      writer = csv.DictWriter(file, ['step', *next(iter(steps.values()))[0]])
      writer.writeheader()
      writer.writerows({'step': name, **row} for name, rows in steps.items() for row in rows)


if __name__ == '__main__':
  main()
