"""Which rows of a table to fit: conditions (`--where`) and one row of each group (`--pick`)."""

import collections
import math
import operator
import re
from collections.abc import Iterable

from research.core.errors import UserError, did_you_mean
from research.scaling import cells
from research.scaling.columns import bare, column_names

# The longer signs first: '<=' is not '<' and a value that begins with '='.
SIGNS = {
  '!=': operator.ne, '<=': operator.le, '>=': operator.ge, '=': operator.eq, '<': operator.lt,
  '>': operator.gt,
}  # fmt: skip
STEPS = ('step', '_step', 'global_step', 'current_steps', 'steps', 'iteration', 'tokens', 'd')


def where(rows: list[dict], conditions: Iterable[str]) -> list[dict]:
  """The rows that meet every condition.

  A condition is COLUMN=VALUE, with !=, <, <=, > or >= in place of =, or 'COLUMN in VALUE,VALUE'. Values
  compare as numbers where both are numbers, and = and != as texts otherwise.

  Raises:
    UserError: a condition cannot be read, a column or a value is unknown, or no row is left.
  """
  for condition in conditions:
    column, sign, wanted = _read(condition, rows)
    matching = [row for row in rows if _meets(row.get(column), sign, wanted)]
    if not matching:
      values = dict.fromkeys(
        str(row[column]) for row in rows if not cells.is_blank(row.get(column))
      )
      few = ', '.join(list(values)[:12])
      raise UserError(f'--where: no row left has {condition}; there are {few}.')
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
  if sign == 'in':
    return any(_meets(cell, '=', [value]) for value in wanted)
  (value,) = wanted
  if cells.is_number(cell) and cells.is_number(value):
    return SIGNS[sign](cells.number(cell), cells.number(value))
  text = '' if cell is None else str(cell)
  return SIGNS[sign](text, value) if sign in ('=', '!=') else False


def pick(rows: list[dict], rules: Iterable[str]) -> list[dict]:
  """One row of each group, by rules in their order.

  'last:run' keeps of every run (of equal values of the named columns) the row with the largest step, or
    the most tokens; 'best:loss:params,tokens' of every cell the row with the lowest loss, such as that of the
    best learning rate; 'all' keeps every row, checkpoints too.
  'skip:0.1:run' leaves out the first tenth of each run; 'mean:loss:run:5' keeps its last row, whose loss is the
    mean of the last 5; 'smooth:loss,accuracy:run:5' makes each of these the mean of 5 rows up to it. Rows
    are in the order of their steps or tokens, and else in that of the table.
  """
  for rule in rules:
    kind, *rest = rule.split(':')
    if kind == 'all' and not rest:
      continue
    if kind == 'last' and len(rest) == 1:
      groups = _groups(rows, rest[0])
      names = {bare(name): name for name in column_names(rows)}
      by = next((names[bare(step)] for step in STEPS if bare(step) in names), None)
      if by is None:
        raise UserError(f'--pick={rule}: no column says which row is last (a step, or tokens).')
      rows = [max(group, key=lambda row: _value(row, by, rule)) for group in groups]
    elif kind == 'best' and len(rest) == 2:
      by = _column(rest[0], rows)
      groups = _groups(rows, rest[1])
      rows = [min(group, key=lambda row: _value(row, by, rule)) for group in groups]
    elif kind == 'skip' and len(rest) == 2:
      share = _number(rest[0], rule, lambda x: 0 <= x < 1, 'a share, such as 0.1')
      rows = [
        row for group in _in_order(rows, rest[1]) for row in group[math.ceil(share * len(group)) :]
      ]
    elif kind in ('mean', 'smooth') and len(rest) == 3:
      window = int(_number(rest[2], rule, lambda x: x >= 1 and x == int(x), 'a number of rows'))
      groups = [_smooth(group, rest[0], window, rule) for group in _in_order(rows, rest[1])]
      rows = [row for group in groups for row in (group[-1:] if kind == 'mean' else group)]
    else:
      raise UserError(
        f'--pick={rule} is none of last:COLUMN, best:LOSS:COLUMN,COLUMN, skip:SHARE:COLUMN, '
        'mean:LOSS:COLUMN:ROWS, smooth:LOSS:COLUMN:ROWS and all, such as last:run or '
        'best:loss:params,tokens.'
      )
  return rows


def _number(text: str, rule: str, allows, what: str) -> float:
  if not cells.is_number(text) or not allows(cells.number(text)):
    raise UserError(f'--pick={rule}: {text!r} is not {what}.')
  return cells.number(text)


def _in_order(rows: list[dict], names: str) -> list[list[dict]]:
  """The groups, each in the order of its steps or tokens where a column has them."""
  columns = {bare(name): name for name in column_names(rows)}
  by = next((columns[bare(step)] for step in STEPS if bare(step) in columns), None)
  groups = _groups(rows, names)
  if by is None:
    return groups
  return [sorted(group, key=lambda row: _value(row, by, 'last')) for group in groups]


def _smooth(group: list[dict], names: str, window: int, rule: str) -> list[dict]:
  """Rows whose named columns are means over the `window` rows up to each, over fewer at the start."""
  columns = [_column(name.strip(), group) for name in names.split(',')]
  for column in columns:
    if bad := [row[column] for row in group if not cells.is_number(row.get(column))]:
      raise UserError(f'--pick={rule}: {column} holds {bad[0]!r}, of which there is no mean.')
  smoothed = []
  for i, row in enumerate(group):
    recent = group[max(0, i + 1 - window) : i + 1]
    means = {c: sum(cells.number(r[c]) for r in recent) / len(recent) for c in columns}
    smoothed.append({**row, **means})
  return smoothed


def _groups(rows: list[dict], names: str) -> list[list[dict]]:
  columns = [_column(name.strip(), rows) for name in names.split(',')]
  groups = collections.defaultdict(list)
  for row in rows:
    groups[tuple(str(row.get(column)) for column in columns)].append(row)
  return list(groups.values())


def _value(row: dict, column: str, rule: str) -> float:
  """A blank or diverged cell is neither last nor best."""
  worst = float('inf') if rule.startswith('best') else float('-inf')
  cell = row.get(column)
  if not cells.is_number(cell):
    return worst
  value = cells.number(cell)
  return worst if value != value else value
