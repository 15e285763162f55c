"""The rows of a table that count, as arrays of N, D, C, loss and every other number.

`tables` reads files and `columns` finds columns. Here each row becomes numbers, or is left out with a reason.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from research.scaling import cells
from research.scaling import columns as columns_module
from research.scaling.cells import RowError
from research.scaling.columns import CONVENTIONS, FLOPS, PARAMS, Columns
from research.scaling.tables import read_table

__all__ = [
  'CONVENTIONS', 'FLOPS', 'PARAMS', 'Columns', 'Observations', 'RowError', 'budget_groups', 'observe',
  'read_table', 'why_not',
]  # fmt: skip

DONE = (
  'finished',
  'done',
  'complete',
  'completed',
  'success',
  'ok',
  '',
)  # of a status, in any case
ARRAYS = ('run', 'params', 'tokens', 'flops', 'loss', 'budget')
# A column of words with at most so many different values is one of choices (data sets, schedules), not of
# names.
CHOICES = 20
# Two runs whose losses agree to so many digits are copies; fewer digits may agree by chance.
COPY_DIGITS = 5
DEFAULT = Columns()


@dataclasses.dataclass(frozen=True)
class Observations:
  """The rows that count.

  Attributes:
    run: the name of each row's run [rows].
    params, tokens, flops, loss: N, D, C and the loss in nats per token [rows].
    budget: the target C of the row's isoFLOP group [rows]; NaN for a row of no group.
    excluded: (run, why) of the rows left out.
    columns: the column of each quantity, quantity -> name.
    extra: every other column of numbers by its name [rows], NaN where a cell is blank.
    labels: the columns of few different words by their name [rows].
    remarks: sentences on what was assumed in reading.
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
    """The rows that a mask or an index selects."""
    arrays = {name: getattr(self, name)[keep] for name in ARRAYS}
    tables = {
      name: {column: values[keep] for column, values in getattr(self, name).items()}
      for name in ('extra', 'labels')
    }
    return dataclasses.replace(self, **arrays, **tables)

  def without(self, leave_out: np.ndarray, why: Iterable[str]) -> 'Observations':
    """The rows outside the mask `leave_out`. The others join `excluded`, each with its reason."""
    listed = tuple((str(run), reason) for run, reason in zip(self.run[leave_out], why, strict=True))
    return dataclasses.replace(self.take(~leave_out), excluded=self.excluded + listed)

  @property
  def inputs(self) -> dict[str, np.ndarray]:
    """The inputs that a law may have: N, D, C, D / N, and every other column of numbers."""
    known = {'params': self.params, 'tokens': self.tokens, 'flops': self.flops}
    return {**self.extra, **known, 'tokens_per_param': self.tokens / self.params}


def observe(
  rows: Iterable[Mapping], columns: Columns = DEFAULT, role: str | None = 'fit'
) -> Observations:
  """Reads the rows of a table into arrays.

  It leaves out, with the reason: rows of another role, rows whose status is not a finished one, losses that are
  NaN or infinite, blank cells, and exact copies of a row (the same N, D and loss to every digit). Without a
  column of tokens D is C / (6 N). Without a column of FLOPs C is the budget if that is near 6 N D, else 6 N D.

  Args:
    role: take only rows of this role, or of none; None for all.

  Raises:
    RowError: a quantity has no column, a number in a finished row is unreadable, zero or negative (with its row
      and column), or no row remains.
  """
  rows = list(rows)
  if not rows:
    raise RowError('The table has no rows.')
  remarks: list[str] = []
  column_of = find_columns(rows, columns, remarks)
  used = []
  excluded = []
  numbers_of = []
  run_of = {}  # the run of every set of numbers so far
  for i, row in enumerate(rows):
    run = str(row.get(column_of.get('run'), '') or f'row {i + 1}')
    numbers = {}
    reason = why_not(row, column_of, role)
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
    raise RowError(f'No row remains to fit: of {len(rows)}, {count} left out because {why}.')
  arrays = {name: [row[name] for row in numbers_of] for name in ARRAYS}
  arrays['budget'] = _budgets(arrays['budget'], arrays['flops'])
  arrays = {name: np.array(values) for name, values in arrays.items()}
  if 'flops' not in column_of:  # so far it is 6 N D
    arrays['flops'] = _budget_as_cost(arrays, remarks)
  extra, labels = _other_columns(used, column_of, columns)
  return Observations(
    **arrays, excluded=tuple(excluded), columns=column_of, extra=extra, labels=labels,
    remarks=tuple(dict.fromkeys(remarks)),
  )  # fmt: skip


def find_columns(rows: list[Mapping], columns: Columns, remarks: list[str]) -> dict[str, str]:
  """The column of each quantity, quantity -> name. Adds to `remarks` what it assumes.

  Raises:
    RowError: N, the loss, or both D and C have no column.
  """
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


def why_not(row: Mapping, column_of: Mapping, role: str | None) -> str | None:
  """Why a row does not count, by its status and its role; None if it does."""
  status = str(row.get(column_of.get('status'), '') or '').strip().lower()
  if status not in DONE:
    return f'its status is {status!r}'
  row_role = str(row.get(column_of.get('role'), '') or '').strip()
  if role is not None and row_role and row_role != role:
    return f'its role is {row_role!r}'
  return None


def _numbers(row, column_of, columns: Columns, where: str) -> tuple[dict, str | None]:
  """(N, D, C, loss in nats and budget of one row by name, None), or ({}, why the row does not count).

  Args:
    where: the row, for messages.
  """
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
  """Why a row is a copy of another; None if not. Two seeds never have the same loss to every digit."""
  key = tuple(numbers[name] for name in ('params', 'tokens', 'flops', 'loss', 'budget'))
  if key not in run_of:
    run_of[key] = run
    return None
  # Rounded losses of two runs may agree by chance.
  digits = len(f'{numbers["loss"]:.12g}'.replace('.', '').strip('0'))
  return f'it repeats {run_of[key]}' if digits >= COPY_DIGITS or run_of[key] == run else None


def _budgets(marks: list, flops: list[float]) -> list[float]:
  """Budgets in FLOPs; for budgets that are names (small, large) the geometric mean C of the rows of a name."""
  values = [math.nan if mark is None else mark for mark in marks]
  if all(cells.is_number(value) for value in values):
    return [cells.number(value) for value in values]
  members = collections.defaultdict(list)
  for mark, c in zip(marks, flops, strict=True):
    members[str(mark)].append(math.log(c))
  mean = {mark: math.exp(sum(logs) / len(logs)) for mark, logs in members.items()}
  return [math.nan if mark is None else mean[str(mark)] for mark in marks]


def _budget_as_cost(arrays: dict, remarks: list[str]) -> np.ndarray:
  """C where it has no column: the budget, which was spent, where every row has one near 6 N D; else 6 N D."""
  budget = arrays['budget']
  six_nd = arrays['flops']
  ratio = six_nd / budget
  # Another unit, or a budget that is not of training FLOPs. NaN is not near either.
  near = np.isfinite(budget) & (budget > 0) & (ratio > 0.2) & (ratio < 5)
  if not near.all():
    return six_nd
  if np.abs(np.log(ratio)).max() > 1e-3:
    remarks.append(
      f'there is no column of FLOPs: C is the budget, of which 6 N D is {ratio.min():.2f} to {ratio.max():.2f}.'
    )
  return budget


def _other_columns(rows: list[Mapping], column_of: dict, columns: Columns) -> tuple[dict, dict]:
  """(the other columns of numbers, NaN where blank; the columns of few different words), by name."""
  extra = {}
  labels = {}
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
  """IsoFLOP groups, (C, row indices) each, in rising C: by budget where every row has one, else by ln C.

  Without budgets, rows whose ln C lies within `tolerance` of a neighbour's form a group. A chain longer than
  three tolerances is not a group, and a single row is none either.
  """
  labelled = np.isfinite(rows.budget)
  if labelled.all():
    return [(float(c), np.flatnonzero(rows.budget == c)) for c in np.unique(rows.budget)]
  order = np.argsort(rows.flops, kind='stable')
  ln_c = np.log(rows.flops[order])
  groups = np.split(order, np.flatnonzero(np.diff(ln_c) > tolerance) + 1)
  result = []
  for members in groups:
    ln_c = np.log(rows.flops[members])
    if len(members) > 1 and np.ptp(ln_c) <= 3 * tolerance:
      result.append((float(np.exp(ln_c.mean())), np.sort(members)))
  return result
