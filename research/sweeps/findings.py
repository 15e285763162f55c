"""What a sweep found: the law of its rows or its design's answer, and its forecast."""

import csv
import io
import json
import math
from typing import TYPE_CHECKING

from research.core import storage
from research.core.errors import UserError
from research.designs import plan
from research.scaling.rows import CONVENTIONS
from research.sweeps.folder import Folder

if TYPE_CHECKING:
  from research.designs.base import Answer
  from research.scaling import Analysis
  from research.sweeps.sweep import Sweep


def write_results(folder: Folder, rows: list[dict]) -> None:
  """results.csv."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  file = io.StringIO()
  writer = csv.DictWriter(file, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  storage.write_atomic(folder.path / 'results.csv', file.getvalue())


def conclude(folder: Folder, sweep: 'Sweep', runs: list[plan.Planned]) -> 'Analysis | Answer | str':
  """The law of the runs or the design's answer, or in one sentence why there is none.

  Leaves results.csv in any case, then fit.json, and summary.txt of an answer.
  """
  rows = folder.rows(runs)
  write_results(folder, rows)
  if sweep.design.law:
    try:
      law = fit(sweep, rows)
    except UserError as refused:
      return str(refused)
    from research.scaling import serial

    storage.write_atomic(folder.path / 'fit.json', serial.to_json(law))
    return law
  answer = sweep.design.answer(runs, rows)
  storage.write_atomic(folder.path / 'summary.txt', f'{answer}\n')
  if answer.fit is not None:
    storage.write_atomic(folder.path / 'fit.json', json.dumps(answer.fit, indent=1) + '\n')
  return answer


# The law.


def columns(sweep: 'Sweep'):
  """Which columns of its rows hold N, D, C and the loss."""
  from research.scaling import Columns

  flops = sweep.design.flops
  return Columns(params=CONVENTIONS[flops], tokens='tokens', flops=flops, loss='loss')


def fit(sweep: 'Sweep', rows: list[dict], **options) -> 'Analysis':
  """The law of a sweep's rows of role 'fit'; options are those of `fit_results`.

  Where budgets are no part of the design, the final losses of a size's runs are its curve for approach 1: a
  loss under way, at a rate that has not come down yet, is no fair one.

  Raises:
    UserError: the rows tell no law.
  """
  from research.scaling import fit_results

  named, curves = columns(sweep), {}
  rows = [row for row in rows if row['role'] == 'fit']
  if rows and not any(row['status'] == 'finished' for row in rows):
    raise UserError(
      f'none of {len(rows)} runs finished; the first: {rows[0].get("reason", rows[0]["status"])}.'
    )
  for row in rows:
    if row['budget'] is None and row['status'] == 'finished':
      curves.setdefault(row[named.params], []).append(row)
  by_tokens = lambda members: sorted((row['tokens'], row['loss']) for row in members)
  curves = {m[0]['run']: by_tokens(m) for m in curves.values() if len(m) > 1}
  return fit_results(rows, columns=named, curves=curves, fixed=sweep.fixed, **options)


def provisional_law(sweep: 'Sweep', rows: list[dict]) -> str:
  """What a fit says of the rows so far, or why it says nothing yet."""
  done = sum(row['status'] == 'finished' and row['role'] == 'fit' for row in rows)
  try:
    analysis = fit(sweep, rows, replicates=200, conventions=False)
  except UserError as error:
    return f'no law of {done} runs yet: {error}'
  exponents = [
    f'{name}: {value:.3f}' + (f' [{low:.3f}, {high:.3f}]' if math.isfinite(low) else '')
    for name, (value, low, high) in analysis.exponents().items()
    if name.startswith('a,')
  ]
  return f'so far, of {done} runs: N* ~ C^a with {"; ".join(exponents)}'


def isoflop_so_far(sweep: 'Sweep', rows: list[dict]) -> str:
  """The law through the minima of the budgets that have one yet; '' where that are fewer than two.

  No parametric law: that would take the workers' time.
  """
  from research.scaling import approaches, observe
  from research.scaling.cost import fit_cost

  try:
    seen = observe(rows, columns(sweep))
    cost = fit_cost(seen.params, seen.tokens, seen.flops)
    found = approaches.isoflop(seen, cost, replicates=200)
  except UserError:
    return ''
  low, high = found.interval('a')
  spread = f' [{low:.3f}, {high:.3f}]' if math.isfinite(low) else ''
  return (
    f'so far N* ~ C^{found.params.exponent:.3f}{spread} by the minima of {len(found.used)} budgets'
  )


# The forecast.
