"""Results as rows: which of a table's rows count, and their N, D, C, loss and every other number.

`tables` reads files, `columns` finds columns; here each row becomes numbers, or is left out with a reason.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from research.scaling import cells
from research.scaling import columns as columns_module
from research.scaling.cells import RowError
from research.scaling.columns import FLOPS, PARAMS, Columns
from research.scaling.tables import read_table

__all__ = [
  'CONVENTIONS',
  'FLOPS',
  'PARAMS',
  'Columns',
  'Observations',
  'RowError',
  'budget_groups',
  'observe',
  'read_table',
]

DONE = ('finished', 'done', 'complete', 'completed', 'success', 'ok', '')
ARRAYS = ('run', 'params', 'tokens', 'flops', 'loss', 'budget')
# No more values than this make a column of names one of choices (data sets, schedules).
CHOICES = 20
DEFAULT = Columns()


@dataclasses.dataclass(frozen=True)
class Observations:
  """The rows that count, as arrays [rows]; `excluded` holds (run, why) for the others.

  `budget` is the isoFLOP group's target C, NaN for a row of no group. `columns` says where each came from.
  `extra`: every other column of numbers by name, NaN where a cell is blank. `labels`: columns of few words.
  `remarks`: what was assumed in reading, as sentences.
  """

  run: np.ndarray
  params: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  budget: np.ndarray
  excluded: tuple[tuple[str, str], ...] = ()
  columns: dict[str, str] = dataclasses.field(default_factory=dict)
  extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  remarks: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.loss)

  def take(self, keep) -> 'Observations':
    """The rows of a mask or an index."""
    arrays = {name: getattr(self, name)[keep] for name in ARRAYS}
    tables = {
      name: {column: values[keep] for column, values in getattr(self, name).items()}
      for name in ('extra', 'labels')
    }
    return dataclasses.replace(self, **arrays, **tables)

  def without(self, leave_out: np.ndarray, why: Iterable[str]) -> 'Observations':
    """The rows but those of the mask `leave_out`; they join `excluded`, each with its reason."""
    listed = tuple((str(run), reason) for run, reason in zip(self.run[leave_out], why, strict=True))
    return dataclasses.replace(self.take(~leave_out), excluded=self.excluded + listed)

  @property
  def inputs(self) -> dict[str, np.ndarray]:
    """What a law may be fitted to: N, D, C, D / N, and every other column of numbers."""
    known = {'params': self.params, 'tokens': self.tokens, 'flops': self.flops}
    return {**self.extra, **known, 'tokens_per_param': self.tokens / self.params}


def observe(
  rows: Iterable[Mapping], columns: Columns = DEFAULT, role: str | None = 'fit'
) -> Observations:
  """Rows as `Observations`.

  Left out and listed: rows of another `role`, rows whose status is not a finished one, losses that are NaN
  or infinite, blank cells, and exact repeats of a row (the same N, D and loss to every digit). Refused with the
  row and the column: an unreadable, zero or negative number in a finished row, and numbers whose units
  cannot be right. Where there is no tokens column, D = C / (6 N); where there is no FLOPs column, C is the
  budget if that is near 6 N D, and else 6 N D.
  """
  rows = list(rows)
  if not rows:
    raise RowError('The table has no rows.')
  remarks: list[str] = []
  column_of = find_columns(rows, columns, remarks)
  used, excluded, numbers_of, run_of = [], [], [], {}
  for i, row in enumerate(rows):
    run = str(row.get(column_of.get('run'), '') or f'row {i + 1}')
    reason, numbers = _why_not(row, column_of, role), {}
    if reason is None:
      numbers, reason = _numbers(row, column_of, columns, f'row {i + 1} ({run})')
    if reason is None:
      reason = _repeats(numbers, run, run_of)
    if reason is None:
      used.append(row)
      numbers_of.append({'run': run, **numbers})
    else:
      excluded.append((run, reason))
  if not used:
    why, count = collections.Counter(why for _, why in excluded).most_common(1)[0]
    raise RowError(f'No row is left to fit: of {len(rows)}, {count} left out because {why}.')
  arrays = {name: [row[name] for row in numbers_of] for name in ARRAYS}
  arrays['budget'] = _budgets(arrays['budget'], arrays['flops'])
  arrays = {name: np.array(values) for name, values in arrays.items()}
  if 'flops' not in column_of:
    arrays['flops'] = _budget_as_cost(arrays, remarks)
  extra, labels = _other_columns(used, column_of, columns)
  return Observations(
    **arrays, excluded=tuple(excluded), columns=column_of, extra=extra, labels=labels,
    remarks=tuple(dict.fromkeys(remarks)),
  )  # fmt: skip


def find_columns(rows: list[Mapping], columns: Columns, remarks: list[str]) -> dict[str, str]:
  """quantity -> column name; what is assumed on the way joins `remarks`."""
  column_of = {}
  for quantity in columns_module.ALIASES:
    column = columns_module.find(rows, columns, quantity)
    if column is not None:
      column_of[quantity] = column
  missing = [quantity for quantity in ('params', 'loss') if quantity not in column_of]
  if 'tokens' not in column_of and 'flops' not in column_of:
    missing.append('tokens (or flops)')
  if missing:
    raise columns_module.missing(missing, rows)
  for quantity in ('params', 'tokens', 'flops'):
    if quantity in column_of:
      scale = columns_module.scale_of(column_of[quantity], quantity, columns)
      if scale != getattr(columns, f'{quantity}_unit'):
        remarks.append(f'the column {column_of[quantity]!r} is read in units of {scale:g}.')
  if 'tokens' not in column_of:
    unread = [c for c in columns_module.column_names(rows) if c.lower() == 't']
    also = f' ({unread[0]!r} is too small to be tokens)' if unread else ''
    remarks.append(
      f'there is no column of tokens{also}: D = {column_of["flops"]} / (6 N) is assumed. If C is '
      'counted in another way, give the tokens (--tokens=COLUMN).'
    )
  return column_of


def _why_not(row, column_of, role) -> str | None:
  status = str(row.get(column_of.get('status'), '') or '').strip().lower()
  if status not in DONE:
    return f'its status is {status!r}'
  its = str(row.get(column_of.get('role'), '') or '').strip()
  if role is not None and its and its != role:
    return f'its role is {its!r}'
  return None


def _numbers(row, column_of, columns: Columns, where: str) -> tuple[dict, str | None]:
  """N, D, C, loss (nats) and budget of one row; or why the row does not count."""
  values = {}
  for quantity in columns_module.QUANTITIES:
    if quantity not in column_of:
      continue
    column = column_of[quantity]
    cell = row.get(column)
    if cells.is_blank(cell):
      return {}, f'its {column} is blank'
    try:
      value = cells.number(cell)
    except ValueError as error:
      raise RowError(f'{where}: {column} is {error}.') from None
    if math.isnan(value) or (quantity == 'loss' and math.isinf(value)):
      return {}, f'its {column} is {value}'
    if value <= 0 or math.isinf(value):
      raise RowError(f'{where}: {column} is {cell}; it must be positive and finite.')
    values[quantity] = value
  unit = columns_module.loss_unit(column_of['loss'], columns)
  loss = values['loss']
  if unit == 'perplexity' and loss <= 1:
    raise RowError(f'{where}: {column_of["loss"]} is {loss:g}; a perplexity is above 1.')
  loss = math.log(loss) if unit == 'perplexity' else loss * (math.log(2) if unit == 'bits' else 1.0)
  for quantity in ('params', 'tokens', 'flops'):
    if quantity in values:
      values[quantity] *= columns_module.scale_of(column_of[quantity], quantity, columns)
  params = values['params']
  tokens = values['tokens'] if 'tokens' in values else values['flops'] / (6 * params)
  flops = values.get('flops', 6 * params * tokens)
  budget = row.get(column_of.get('budget'))
  budget = None if cells.is_blank(budget) else budget
  return {'params': params, 'tokens': tokens, 'flops': flops, 'loss': loss, 'budget': budget}, None


def _repeats(numbers: dict, run: str, run_of: dict) -> str | None:
  """Why a row is the copy of another: two seeds never have one loss to every digit."""
  key = tuple(numbers[name] for name in ('params', 'tokens', 'flops', 'loss', 'budget'))
  if key not in run_of:
    run_of[key] = run
    return None
  # Rounded losses may agree by chance under two names.
  digits = len(f'{numbers["loss"]:.12g}'.replace('.', '').strip('0'))
  return f'it repeats {run_of[key]}' if digits >= 5 or run_of[key] == run else None


def _budgets(marks: list, flops: list[float]) -> list[float]:
  """Budgets in FLOPs; where they are names (small, large), the geometric mean C of the rows of that name."""
  values = [math.nan if mark is None else mark for mark in marks]
  if all(cells.is_number(value) for value in values):
    return [cells.number(value) for value in values]
  members = collections.defaultdict(list)
  for mark, c in zip(marks, flops, strict=True):
    members[str(mark)].append(math.log(c))
  mean = {mark: math.exp(sum(logs) / len(logs)) for mark, logs in members.items()}
  return [math.nan if mark is None else mean[str(mark)] for mark in marks]


def _budget_as_cost(arrays: dict, remarks: list[str]) -> np.ndarray:
  """C where there is no column of it: what was spent is the budget, and 6 N D only its usual estimate."""
  budget, six = arrays['budget'], arrays['flops']
  ratio = six / budget
  if (
    not np.isfinite(budget).all()
    or not (budget > 0).all()
    or not (ratio > 0.2).all()
    or not (ratio < 5).all()
  ):
    return six
  if np.abs(np.log(ratio)).max() > 1e-3:
    remarks.append(
      f'there is no column of FLOPs: C is the budget, of which 6 N D is {ratio.min():.2f} to {ratio.max():.2f}.'
    )
  return budget


def _other_columns(rows: list[Mapping], column_of: dict, columns: Columns) -> tuple[dict, dict]:
  """The other columns that hold numbers (NaN where blank), and those of few words."""
  extra, labels = {}, {}
  taken = {column_of[quantity] for quantity in columns_module.QUANTITIES if quantity in column_of}
  for name in columns_module.column_names(rows):
    column = [row.get(name) for row in rows]
    filled = [cell for cell in column if not cells.is_blank(cell)]
    if (name in taken and name not in columns.inputs.values()) or not filled:
      continue
    if all(cells.is_number(cell) for cell in filled):
      extra[name] = np.array([math.nan if cells.is_blank(c) else cells.number(c) for c in column])
    elif len(values := {str(cell) for cell in filled}) <= CHOICES and len(values) > 1:
      labels[name] = np.array([str(cell) if not cells.is_blank(cell) else '' for cell in column])
  return extra, labels


def budget_groups(rows: Observations, tolerance: float = 0.12) -> list[tuple[float, np.ndarray]]:
  """IsoFLOP groups [(C, row indices)] in rising C: by the budget column, else by gaps in ln C.

  Without a column, rows belong together whose ln C lie within `tolerance` of a neighbour's; a chain longer
  than three tolerances is no isoFLOP group, and a row alone is none.
  """
  labelled = np.isfinite(rows.budget)
  if labelled.all():
    return [(float(c), np.flatnonzero(rows.budget == c)) for c in np.unique(rows.budget)]
  order = np.argsort(rows.flops, kind='stable')
  ln_c = np.log(rows.flops[order])
  groups = np.split(order, np.flatnonzero(np.diff(ln_c) > tolerance) + 1)
  close = lambda g: np.ptp(np.log(rows.flops[g])) <= 3 * tolerance
  return [
    (float(np.exp(np.log(rows.flops[g]).mean())), np.sort(g))
    for g in groups
    if len(g) > 1 and close(g)
  ]


CONVENTIONS = {
  'flops_6n_non_embedding': 'params_non_embedding',
  'flops_6n_with_head': 'params_with_head',
  'flops_attention_causal': 'params_with_head',
  'flops_attention_full': 'params_with_head',
  'flops_chinchilla': 'params_total',
}
