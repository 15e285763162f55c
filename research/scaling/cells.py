"""Reads a cell of a table as a number: 1,234, 3,74, 125M, 6.9B tokens, 2 PF-days."""

import math
import re
from collections.abc import Iterable

from research.core.errors import UserError

PF_DAYS = 8.64e19  # 1e15 FLOP/s for a day
BLANK = frozenset(('', '-', '--', '—', 'na', 'n/a', '#n/a', 'none', 'null', 'nil', '?', '.'))
PREFIXES = {'k': 1e3, 'm': 1e6, 'g': 1e9, 'b': 1e9, 't': 1e12, 'p': 1e15, 'e': 1e18, 'z': 1e21}
# A unit that may follow a number, perhaps after a prefix: 125M params, 3.2 TFLOPs, 1e18 FLOPs.
UNIT = r'(?:params?|parameters|tokens?|toks?|flops?|nats?)?'
# These prefixes need the unit: 1e alone is a number that was cut short, and 1p means nothing.
LARGE = r'([pez])(?=flops?)'
NUMBER = re.compile(
  rf'([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?:([kmgbt]?)|{LARGE})\s*{UNIT}', re.IGNORECASE
)
PF_DAY = re.compile(
  r'([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?:pf|pflops?|petaflops?)(?:/s)?[ -]?days?',
  re.IGNORECASE,
)
# Digits with commas or dots between them: 1,234,567  1.234,5  3,74  1,234.5
GROUPED = re.compile(r'[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?\s*[a-zA-Z]*')
DECIMAL_POINT, DECIMAL_COMMA = '.', ','


def is_blank(cell) -> bool:
  """Whether a cell has no value: None, '', '-', 'n/a', 'null'."""
  return cell is None or (isinstance(cell, str) and cell.strip().lower() in BLANK)


def decimal_mark(column: Iterable) -> str | None:
  """The decimal mark that the commas in cells imply, '.' or ','; None where they imply neither.

  3,74 implies a decimal comma, 1,234,567 and 1,234.5 a decimal point; 1,234 alone may have either.

  Raises:
    ValueError: some cells imply a comma and others a point.
  """
  marks = {mark_of(cell) for cell in column if isinstance(cell, str) and ',' in cell}
  marks -= {None, 'either'}
  if len(marks) > 1:
    raise ValueError('both decimal commas and decimal points')
  return marks.pop() if marks else None


def mark_of(cell: str) -> str | None:
  """The decimal mark that one cell with a comma implies, 'either', or None where it is not a number."""
  cell = cell.strip()
  if not GROUPED.fullmatch(cell):
    return None
  digits = re.match(r'[+-]?([\d.,]+)', cell).group(1)
  if '.' in digits:
    return DECIMAL_COMMA if digits.rindex(',') > digits.rindex('.') else DECIMAL_POINT
  groups = digits.split(',')
  if any(len(group) != 3 for group in groups[1:]) or len(groups[0]) > 3 or groups[0] == '0':
    return DECIMAL_COMMA if len(groups) == 2 else None
  return DECIMAL_POINT if len(groups) > 2 else 'either'


def number(cell) -> float:
  """A cell as a number, multiplied by its suffix. NaN and infinities are numbers here.

  Raises:
    ValueError: the cell is not a number, or may be read as two.
  """
  if isinstance(cell, (bool, list, dict)) or cell is None:
    raise ValueError(f'{cell!r}, which is not a number')
  if not isinstance(cell, str):
    try:
      return float(cell)  # numpy's scalars and Decimal too
    except OverflowError:
      return math.inf
    except (TypeError, ValueError):
      raise ValueError(f'{cell!r}, which is not a number') from None
  text = plain(cell.strip().replace('\u00a0', ' ').replace('\u202f', ' '))
  text = re.sub(r"(?<=\d)[ '_](?=\d{3}(?!\d))", '', text)
  if match := PF_DAY.fullmatch(text):
    return float(match.group(1)) * PF_DAYS
  if match := NUMBER.fullmatch(text):
    return float(match.group(1)) * PREFIXES.get(
      (match.group(2) or match.group(3) or '').lower(), 1.0
    )
  try:
    return float(text)  # nan, inf, 1e400
  except ValueError:
    raise ValueError(f'{cell!r}, which is not a number') from None


def plain(text: str, mark: str | None = None) -> str:
  """The text of a number with a point as its decimal mark and nothing between thousands.

  Args:
    mark: the decimal mark of the column, for a number that may have either.

  Raises:
    ValueError: the number may have either mark, and `mark` is None.
  """
  shown = mark_of(text) if ',' in text else None
  if shown is None:
    return text
  mark = shown if shown != 'either' else mark
  if mark is None:
    either = text.replace(',', ''), text.replace(',', '.')
    raise ValueError(f'{text!r}, which may be {either[0]} or {either[1]}')
  return text.replace('.', '').replace(',', '.') if mark == ',' else text.replace(',', '')


def is_number(cell) -> bool:
  """Whether `number` can read the cell."""
  try:
    number(cell)
  except ValueError:
    return False
  return True


class RowError(UserError, ValueError):
  """A table cannot be fitted as it is: the message names the row and the column."""
