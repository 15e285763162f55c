"""The result of a sweep: the law of its rows, its design's answer, or the reason why there is neither."""

import csv
import dataclasses
import io
import json
import math

from research.core import storage
from research.core.errors import UserError
from research.designs.base import Answer
from research.designs.plan import Planned
from research.scaling import Analysis, Columns, approaches, fit_results, observe, serial
from research.scaling.cost import fit_cost
from research.scaling.rows import CONVENTIONS
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class Refused:
  """No law goes through the rows of a sweep.

  Attributes:
    reason: why not, and what would help, in one sentence.
  """

  reason: str

  def __str__(self) -> str:
    return f'no law: {self.reason}'


def write_results(folder: Folder, rows: list[dict], finding=None) -> None:
  """Writes results.csv, with a column for every key of any row, and those that an `Answer` adds."""
  if isinstance(finding, Answer):
    rows = [{**row, **finding.columns.get(row['run'], {})} for row in rows]
  columns = list(dict.fromkeys(key for row in rows for key in row))
  file = io.StringIO()
  writer = csv.DictWriter(file, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  storage.write_atomic(folder.path / 'results.csv', file.getvalue())


def conclude(folder: Folder, sweep: Sweep, runs: list[Planned]) -> Analysis | Answer | Refused:
  """The law of the runs; the answer of a design without a law; or why there is neither.

  Always writes results.csv; writes fit.json where something was fitted, and summary.txt with an answer.
  """
  rows = folder.rows(runs)
  write_results(folder, rows)  # whatever becomes of the law
  if sweep.design.law:
    try:
      analysis = fit(sweep, rows)
    except UserError as error:
      return Refused(str(error))
    storage.write_atomic(folder.path / 'fit.json', serial.to_json(analysis))
    return analysis
  answer = sweep.design.answer(runs, rows)
  write_results(folder, rows, answer)
  storage.write_atomic(folder.path / 'summary.txt', f'{answer}\n')
  if answer.fit is not None:
    storage.write_atomic(folder.path / 'fit.json', json.dumps(answer.fit, indent=1) + '\n')
  return answer


def columns(sweep: Sweep) -> Columns:
  """The columns of N, D, C and the loss in the rows of a sweep, by the convention of its design."""
  flops = sweep.design.flops
  return Columns(params=CONVENTIONS[flops], tokens='tokens', flops=flops, loss='loss')


def fit(sweep: Sweep, rows: list[dict], **options) -> Analysis:
  """Fits the sweep's law to its rows of role 'fit'; `options` are those of `fit_results`.

  Where the design has no budgets, the final losses of the runs of one size are its curve for approach 1.
  Losses during a run would be too high, because the learning rate has not decayed yet.

  Raises:
    UserError: the rows do not determine a law.
  """
  named = columns(sweep)
  rows = [row for row in rows if row['role'] == 'fit']
  if rows and not any(row['status'] == 'finished' for row in rows):
    raise UserError(
      f'none of {len(rows)} runs finished; the first: {rows[0].get("reason", rows[0]["status"])}.'
    )
  by_size: dict[float, list[dict]] = {}
  for row in rows:
    if row['budget'] is None and row['status'] == 'finished':
      by_size.setdefault(row[named.params], []).append(row)
  curves = {
    members[0]['run']: sorted((row['tokens'], row['loss']) for row in members)
    for members in by_size.values()
    if len(members) > 1
  }
  return fit_results(
    rows, columns=named, law=sweep.law, curves=curves, fixed=sweep.fixed, **options
  )


def provisional_law(sweep: Sweep, rows: list[dict]) -> str:
  """The law of the rows so far, in a line, or why there is none yet."""
  count = sum(row['status'] == 'finished' and row['role'] == 'fit' for row in rows)
  try:
    analysis = fit(sweep, rows, replicates=200, conventions=False)
  except UserError as error:
    return f'no law of {count} runs yet: {error}'
  exponents = [
    f'{name}: {value:.3f}' + (f' [{low:.3f}, {high:.3f}]' if math.isfinite(low) else '')
    for name, (value, low, high) in analysis.exponents().items()
    if name.startswith('a,')
  ]
  return f'so far, of {count} runs: N* ~ C^a with {"; ".join(exponents)}'


def isoflop_so_far(sweep: Sweep, rows: list[dict]) -> str:
  """The power law through the minima of the budgets that have one yet; '' where fewer than two have.

  It leaves out the parametric law, whose fit would take processor time from the workers.
  """
  try:
    observed = observe(rows, columns(sweep))
    cost = fit_cost(observed.params, observed.tokens, observed.flops)
    isoflop = approaches.isoflop(observed, cost, replicates=200)
  except UserError:
    return ''
  low, high = isoflop.interval('a')
  spread = f' [{low:.3f}, {high:.3f}]' if math.isfinite(low) else ''
  return (
    f'so far N* ~ C^{isoflop.params.exponent:.3f}{spread} '
    f'by the minima of {len(isoflop.used)} budgets'
  )
