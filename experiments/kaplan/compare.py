"""Kaplan's exponent, and how each step of Porian et al. 2024 (arXiv:2406.19146) changes it, on our own runs.

    for name in constant warmup cosine; do
      python -m research.sweep --gin_file=experiments/kaplan/$name.gin --workdir=runs/kaplan/$name
    done
    python experiments/kaplan/compare.py --runs=runs/kaplan

A run at a constant rate gives rows before its end: a size's validation loss at D is interpolated between its
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


def rows_along_runs(folder: pathlib.Path, params: str) -> list[dict]:
  """Rows at shared budgets, from the curves of runs that were evaluated while they trained."""
  runs = []
  for path in sorted(folder.glob('runs/*/run.json')):
    row = json.loads(path.read_text())
    lines = map(json.loads, (path.parent / 'metrics.jsonl').read_text().splitlines())
    curve = {x['tokens']: x['validation/loss'] for x in lines if 'validation/loss' in x}
    ln_tokens = np.log(sorted(curve))
    ln_losses = np.log([curve[tokens] for tokens in sorted(curve)])
    runs.append((path.parent.name, row, row[PAIRS[params]] / row['tokens'], ln_tokens, ln_losses))
  # The largest budget that every run reaches.
  largest = min(per_token * math.exp(ln_tokens[-1]) for _, _, per_token, ln_tokens, _ in runs)
  rows = []
  for budget in largest / 2.0 ** np.arange(6):
    for name, row, per_token, ln_tokens, ln_losses in runs:
      ln_d = math.log(budget / per_token)
      if ln_tokens[0] <= ln_d <= ln_tokens[-1] * (1 + 1e-6):
        loss = math.exp(np.interp(ln_d, ln_tokens, ln_losses))
        rows.append(_row(f'{name}@{budget:.2e}', row[params], math.exp(ln_d), budget, loss))
  return rows


def rows_of_ends(path: pathlib.Path, params: str) -> list[dict]:
  """The rows of a sweep, where each run had a schedule of its own length."""
  with path.open() as file:
    rows = [row for row in csv.DictReader(file) if row['role'] == 'fit' and row['loss']]
  columns = (params, 'tokens', 'budget', 'loss')
  return [_row(row['run'], *(float(row[column]) for column in columns)) for row in rows]


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
  allocation = analysis.approach2
  return allocation.params.exponent, *allocation.interval('a'), len(allocation.used)


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
  without_head, with_head = PAIRS
  steps = {
    "Kaplan's way": rows_along_runs(flags.runs / 'constant', without_head),
    'the head counted': rows_along_runs(flags.runs / 'constant', with_head),
    'a short warm-up': rows_along_runs(flags.runs / 'warmup', with_head),
    'a cosine to each horizon': rows_of_ends(flags.runs / 'cosine/results.csv', with_head),
    'rates by size': rows_of_ends(flags.tuned, with_head),
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
