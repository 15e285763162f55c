"""Selects the rows of a table to fit: by conditions (`--where`), and by one row of each group (`--pick`)."""

import collections
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable

from research.core.errors import UserError, did_you_mean
from research.scaling import cells
from research.scaling.columns import bare, column_names

# The longer signs come first, so that '<=' is not read as '<' and a value that begins with '='.
SIGNS = {
  '!=': operator.ne, '<=': operator.le, '>=': operator.ge, '=': operator.eq, '<': operator.lt,
  '>': operator.gt,
}  # fmt: skip
# Columns that order the rows of a run, in the order of preference.
STEPS = ('step', '_step', 'global_step', 'current_steps', 'steps', 'iteration', 'tokens', 'd')


def where(rows: list[dict], conditions: Iterable[str]) -> list[dict]:
  """The rows that meet every condition.

  A condition is COLUMN=VALUE, with !=, <, <=, > or >= in place of =, or 'COLUMN in VALUE,VALUE'. Values
  compare as numbers where both are numbers. Otherwise = and != compare them as texts.

  Raises:
    UserError: a condition cannot be read, a column or a value is unknown, or no row remains.
  """
  for condition in conditions:
    column, sign, wanted = _read(condition, rows)
    matching = [row for row in rows if _meets(row.get(column), sign, wanted)]
    if not matching:
      values = dict.fromkeys(
        str(row[column]) for row in rows if not cells.is_blank(row.get(column))
      )
      few = ', '.join(list(values)[:12])
      raise UserError(f'--where: no row has {condition}; there are {few}.')
    rows = matching
  return rows


def _read(condition: str, rows) -> tuple[str, str, list[str]]:
  """(column, sign, values)."""
  if match := re.fullmatch(r'(.+?)\s+in\s+(.+)', condition):
    values = [value.strip() for value in match.group(2).strip('()[] ').split(',')]
    return _column(match.group(1).strip(), rows), 'in', values
  if match := re.fullmatch(r'([^=<>!]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)', condition):
    column, sign, value = match.groups()
    if sign not in ('=', '!=') and not cells.is_number(value):
      raise UserError(f'--where={condition}: {value!r} is not a number, so nothing is {sign} it.')
    return _column(column.strip(), rows), sign, [value.strip()]
  raise UserError(
    f'--where={condition} is not COLUMN=VALUE (or !=, <, <=, >, >=, "COLUMN in A,B").'
  )


def _column(name: str, rows) -> str:
  names = column_names(rows)
  matches = [name] if name in names else [other for other in names if bare(other) == bare(name)]
  if len(matches) != 1:
    raise UserError(f'--where: there is no column {name!r}.{did_you_mean(name, names)}')
  return matches[0]


def _meets(cell, sign: str, wanted: list[str]) -> bool:
  """Whether a cell meets a condition; one that is not a number is never above or below another."""
  if sign == 'in':
    return any(_meets(cell, '=', [value]) for value in wanted)
  (value,) = wanted
  if cells.is_number(cell) and cells.is_number(value):
    return SIGNS[sign](cells.number(cell), cells.number(value))
  text = '' if cell is None else str(cell)
  return SIGNS[sign](text, value) if sign in ('=', '!=') else False


def pick(rows: list[dict], rules: Iterable[str]) -> list[dict]:
  """Reduces groups of rows by rules, one after the other.

  - 'last:run' keeps the row of each run with the largest step, or the most tokens.
  - 'best:loss:params,tokens' keeps the row of each (params, tokens) with the lowest loss, such as that of the
  best
    learning rate.
  - 'all' keeps every row, checkpoints too.
  - 'skip:0.1:run' leaves out the first tenth of each run.
  - 'mean:loss:run:5' keeps the last row of each run, with the mean of its last 5 losses.
  - 'smooth:loss,accuracy:run:5' replaces each loss and accuracy by the mean of the 5 rows up to it.

  Rows are in the order of their steps or tokens, or without these in that of the table.

  Raises:
    UserError: a rule cannot be read, or a column is unknown or holds no numbers.
  """
  for rule in rules:
    kind, *rest = rule.split(':')
    if kind == 'all' and not rest:
      continue
    if kind == 'last' and len(rest) == 1:
      by = _order_column(rows)
      if by is None:
        raise UserError(f'--pick={rule}: no column says which row is last (a step, or tokens).')
      last = functools.partial(_value, column=by, worst=-math.inf)
      rows = [max(group, key=last) for group in _groups(rows, rest[0])]
    elif kind == 'best' and len(rest) == 2:
      lowest = functools.partial(_value, column=_column(rest[0], rows), worst=math.inf)
      rows = [min(group, key=lowest) for group in _groups(rows, rest[1])]
    elif kind == 'skip' and len(rest) == 2:
      share = _number(rest[0], rule, 'a share, such as 0.1')
      if not 0 <= share < 1:
        raise UserError(f'--pick={rule}: {rest[0]!r} is not a share, such as 0.1.')
      groups = _in_order(rows, rest[1])
      rows = [row for group in groups for row in group[math.ceil(share * len(group)) :]]
    elif kind in ('mean', 'smooth') and len(rest) == 3:
      window = _number(rest[2], rule, 'a number of rows')
      if not (window >= 1 and window == int(window)):
        raise UserError(f'--pick={rule}: {rest[2]!r} is not a number of rows.')
      groups = [_smooth(group, rest[0], int(window), rule) for group in _in_order(rows, rest[1])]
      if kind == 'mean':
        groups = [group[-1:] for group in groups]
      rows = list(itertools.chain.from_iterable(groups))
    else:
      raise UserError(
        f'--pick={rule} is none of last:COLUMN, best:LOSS:COLUMN,COLUMN, skip:SHARE:COLUMN, '
        'mean:LOSS:COLUMN:ROWS, smooth:LOSS:COLUMN:ROWS and all, such as last:run or '
        'best:loss:params,tokens.'
      )
  return rows


def _number(text: str, rule: str, what: str) -> float:
  if not cells.is_number(text) or not math.isfinite(cells.number(text)):
    raise UserError(f'--pick={rule}: {text!r} is not {what}.')
  return cells.number(text)


def _order_column(rows: list[dict]) -> str | None:
  """The column of steps or tokens by which the rows of a run are ordered; None where there is none."""
  names = {bare(name): name for name in column_names(rows)}
  return next((names[bare(step)] for step in STEPS if bare(step) in names), None)


def _in_order(rows: list[dict], names: str) -> list[list[dict]]:
  """The groups, each in the order of its steps or tokens where a column has them."""
  by = _order_column(rows)
  groups = _groups(rows, names)
  if by is None:
    return groups
  step = functools.partial(_value, column=by, worst=-math.inf)
  return [sorted(group, key=step) for group in groups]


def _smooth(group: list[dict], names: str, window: int, rule: str) -> list[dict]:
  """The rows with means over the last `window` rows in the named columns, over fewer rows at the start."""
  columns = [_column(name.strip(), group) for name in names.split(',')]
  for column in columns:
    if bad := [row[column] for row in group if not cells.is_number(row.get(column))]:
      raise UserError(f'--pick={rule}: {column} holds {bad[0]!r}, which has no mean.')
  smoothed = []
  for i, row in enumerate(group):
    recent = group[max(0, i + 1 - window) : i + 1]
    means = {c: sum(cells.number(r[c]) for r in recent) / len(recent) for c in columns}
    smoothed.append({**row, **means})
  return smoothed


def _groups(rows: list[dict], names: str) -> list[list[dict]]:
  """The rows in groups of equal values of the columns `names`, which commas separate."""
  columns = [_column(name.strip(), rows) for name in names.split(',')]
  groups = collections.defaultdict(list)
  for row in rows:
    groups[tuple(str(row.get(column)) for column in columns)].append(row)
  return list(groups.values())


def _value(row: dict, column: str, worst: float) -> float:
  """The number in a cell, or `worst` for a blank or NaN cell, which is neither last nor best."""
  cell = row.get(column)
  if not cells.is_number(cell):
    return worst
  value = cells.number(cell)
  return worst if math.isnan(value) else value
