"""Reads tables in JSON: an array of rows, an object of columns, or an object on each line."""

import json

from research.scaling.cells import RowError


def read_json_rows(path, text: str) -> list[dict]:
  """The rows of a JSON text, column -> cell; nested objects become columns a/b.

  Args:
    path: of the file, for its ending and for messages.

  Raises:
    RowError: the text is not JSON, or not a table.
  """
  lines = path.suffix in ('.jsonl', '.ndjson') or '.jsonl' in path.suffixes
  if not lines:
    try:
      value = json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
      # 'Extra data' after the first value is how JSON-lines looks to a JSON parser.
      if not (isinstance(error, json.JSONDecodeError) and error.msg == 'Extra data'):
        raise _not_json(path, getattr(error, 'lineno', 1), error) from None
      lines = True  # several values, one on each line, whatever the file is called
    else:
      return _rows_of(path, value)
  rows = []
  for i, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line, object_pairs_hook=_object)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
      raise _not_json(path, i, error) from None
    if not isinstance(value, dict):
      raise RowError(f'{path}:{i} is {_kind(value)} and not an object {{column: value}}.')
    rows.append(_flat(value))
  return rows


def _object(pairs: list[tuple]) -> dict:
  """An object, or ValueError for a key that comes twice, of which Python would silently keep the last."""
  value = dict(pairs)
  if len(value) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {twice!r} comes twice in an object')
  return value


def _not_json(path, line: int, error: Exception) -> RowError:
  why = getattr(error, 'msg', None) or str(error) or type(error).__name__
  return RowError(f'{path}:{line} is not JSON: {why}.')


def _rows_of(path, value) -> list[dict]:
  """The rows of a list of objects, of an object of columns (lists of one length), or of a single object."""
  if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
    if len({len(v) for v in value.values()}) != 1:
      raise RowError(f'{path} has columns of different lengths.')
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
  if isinstance(value, dict):
    return [_flat(value)]
  if not isinstance(value, list):
    raise RowError(f'{path} has {_kind(value)} and not a list of rows.')
  for i, row in enumerate(value, 1):
    if not isinstance(row, dict):
      raise RowError(f'{path}: row {i} is {_kind(row)} and not an object {{column: value}}.')
  return [_flat(row) for row in value]


def _flat(row: dict, prefix: str = '') -> dict:
  """{'eval': {'loss': 3}} as {'eval/loss': 3}."""
  flat = {}
  for name, value in row.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}/')
    else:
      flat[prefix + name] = value
  return flat


def _kind(value) -> str:
  """What a JSON value is, for a message."""
  if value is None:
    return 'null'
  names = {list: 'a list', str: 'a text', bool: 'a truth value', dict: 'an object'}
  return names.get(type(value), 'a number')
