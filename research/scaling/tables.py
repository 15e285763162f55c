"""Reads a table of results: finds the kind of file, its encoding, its separator and its decimal mark.

The first bytes of a file decide what it is, and its name only where they leave a choice. `Table.reading` says
in one line what was unusual, and what may be read in two ways is an error.
"""

import bz2
import csv
import dataclasses
import gzip
import io
import lzma
import pathlib
import zlib

from research.core.errors import did_you_mean, first_line
from research.core.storage import LFS_POINTER
from research.scaling import cells
from research.scaling.cells import RowError
from research.scaling.json_tables import read_json_rows

SEPARATORS = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'}
COMPRESSED = {
  b'\x1f\x8b': ('gzip', gzip.decompress),
  b'BZh': ('bzip2', bz2.decompress),
  b'\xfd7zXZ': ('xz', lzma.decompress),
}
REFUSED = {
  b'PK\x03\x04': 'a zip archive or an Excel workbook; save the sheet as CSV',
  b'\xd0\xcf\x11\xe0': 'an old Excel workbook; save the sheet as CSV',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd; decompress it first',
  LFS_POINTER: 'a pointer of Git LFS and not the file itself; run git lfs pull',
}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows of a file, column -> cell. `reading` says what was unusual about the file, or is ''."""

  rows: list[dict]
  reading: str = ''


def read_table(path) -> list[dict]:
  """The rows of a table; see `read`."""
  return read(path).rows


def read(path) -> Table:
  """Reads a CSV, JSON, JSON-lines or Parquet file, compressed or not.

  A CSV may have any separator, and be in UTF-8, UTF-16 or Windows-1252.

  Raises:
    RowError: there is no such file, it is of another kind or damaged, a row has more cells than there are
      columns, or two columns of the same name differ.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    kind = 'a folder and not a file' if path.is_dir() else 'not a file'
    raise RowError(f'{path} is {kind}.{did_you_mean(path.name, beside)}')
  remarks = []
  try:
    data = path.read_bytes()
  except OSError as error:
    raise RowError(f'{path} could not be read: {error.strerror}.') from None
  for magic, (name, decompress) in COMPRESSED.items():
    if data.startswith(magic):
      try:
        data = decompress(data)
      except DAMAGED:
        raise RowError(f'{path} is a damaged or cut {name} file.') from None
      remarks.append(f'compressed by {name}')
  for magic, kind in REFUSED.items():
    if data.startswith(magic):
      raise RowError(f'{path} is {kind}.')
  if data[:4] == b'PAR1' or path.suffix in ('.parquet', '.pq'):
    return Table(_read_parquet(path, data), _line(remarks))
  text = _decode(path, data, remarks)
  if not text.strip():
    raise RowError(f'{path} is empty.')
  if text.lstrip()[:1] in ('[', '{') or path.suffix in ('.json', '.jsonl', '.ndjson'):
    return Table(read_json_rows(path, text), _line(remarks))
  return Table(_read_separated(path, text, remarks), _line(remarks))


def _line(remarks: list[str]) -> str:
  return ', '.join(remarks)


def _read_parquet(path, data: bytes) -> list[dict]:
  # Only here: the import takes a quarter of a second.
  import pyarrow
  import pyarrow.parquet

  try:
    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise RowError(f'{path} is not a Parquet file, or is damaged: {first_line(error)}.') from None


def _decode(path, data: bytes, remarks: list[str]) -> str:
  """The text of a file, by its byte order mark, else as UTF-8, else as Windows-1252, which any bytes can be."""
  for mark, encoding in (
    (b'\xff\xfe', 'utf-16'),
    (b'\xfe\xff', 'utf-16'),
    (b'\xef\xbb\xbf', 'utf-8-sig'),
  ):
    if data.startswith(mark):
      if encoding == 'utf-16':
        remarks.append('UTF-16')
      try:
        return data.decode(encoding)
      except UnicodeDecodeError:
        raise RowError(f'{path} begins as {encoding}, but is not {encoding} throughout.') from None
  if b'\0' in data:
    raise RowError(f'{path} is not a table of text: it has zero bytes.')
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError:
    remarks.append('not UTF-8, read as Windows-1252')
    return data.decode('cp1252', errors='replace')


def _read_separated(path, text: str, remarks: list[str]) -> list[dict]:
  """The rows of a text with separators. Lines that begin with # before the header are comments."""
  lines = text.splitlines(keepends=True)
  comments = 0
  while comments < len(lines) and (lines[comments][:1] == '#' or not lines[comments].strip()):
    comments += 1
  if comments == len(lines):
    raise RowError(f'{path} has comments and no rows.')
  separator, records = _split(path, ''.join(lines[comments:]))
  if separator != ',':
    remarks.append(f'separated by {SEPARATORS.get(separator, "spaces")}')
  (_, head), *records = records
  names = _names(path, head, records)
  rows = []
  for line, record in records:
    surplus = [cell for cell in record[len(names) :] if cell.strip()]
    if surplus:
      raise RowError(
        f'{path}:{line + comments} has {len(record)} cells in {len(names)} columns '
        f'({surplus[0]!r} is surplus): put quotes around what holds a separator, or give the last '
        'column a name.'
      )
    record = record + [''] * (len(names) - len(record))
    rows.append({name: record[i] for name, i in names.items()})
  if not rows:
    raise RowError(f'{path} has names of columns and no rows.')
  _decimal_marks(path, rows, remarks)
  return rows


def _split(path, text: str) -> tuple[str, list[tuple[int, list[str]]]]:
  """(the separator, the (line, cells) of every record that is not empty).

  The separator is the one that gives every row as many cells as the header has.
  """
  header = text.splitlines()[0]
  readings = {}
  for separator in [s for s in SEPARATORS if s in header] or [',']:
    readings[separator] = records = _records(path, text, separator)
    # No separator at all: columns may be aligned by spaces, as many in every row.
    if separator == ',' and ',' not in header and len(header.split()) > 1:
      by_spaces = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
      if len({len(record) for _, record in by_spaces}) == 1:
        return ' ', by_spaces
    if not records:
      raise RowError(f'{path} has no rows.')
  even = [s for s, records in readings.items() if len({len(r) for _, r in records}) == 1]
  if len(even) > 1:
    raise RowError(
      f'{path} may be separated by {" or by ".join(SEPARATORS[s] for s in even)}: with either, every '
      'row has the same number of cells. Save it with one of them, and with quotes around cells '
      'that contain the other.'
    )
  if even:
    return even[0], readings[even[0]]
  # No separator fits all rows: take the one that gives the header most cells, so that the error names a row.
  header_cells = {s: len(records[0][1]) for s, records in readings.items()}
  separator = max(header_cells, key=header_cells.get)
  return separator, readings[separator]


def _records(path, text: str, separator: str) -> list[tuple[int, list[str]]]:
  """The (line, cells) of every record that is not empty."""
  reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator)
  records = []
  try:
    for record in reader:
      if any(cell.strip() for cell in record):
        records.append((reader.line_num, record))
  except csv.Error as error:
    raise RowError(f'{path}:{reader.line_num} is not CSV: {error}.') from None
  return records


def _names(path, head: list[str], records) -> dict[str, int]:
  """The position of each column by its name.

  A column without a name, such as an index, is called by its number. A column that repeats another one, name
  and cells, is dropped.
  """
  head = [name.strip() for name in head]
  while head and not head[-1]:
    head.pop()
  if any(cells.is_number(name) for name in head):
    raise RowError(
      f'The first row of {path} holds numbers ({", ".join(head[:4])}) where the names of the '
      'columns should be: add a row of names, such as params,tokens,loss.'
    )
  names = {}
  for i, name in enumerate(head):
    name = name or f'column {i + 1}'
    if name not in names:
      names[name] = i
      continue
    other = names[name]
    if any(_cell(record, i) != _cell(record, other) for _, record in records):
      raise RowError(
        f'{path} has two columns called {name!r} (the {other + 1}th and the {i + 1}th) that '
        'differ: rename or remove one of them.'
      )
  return names


def _cell(record: list[str], position: int) -> str:
  return record[position].strip() if position < len(record) else ''


def _decimal_marks(path, rows: list[dict], remarks: list[str]) -> None:
  """Rewrites numbers with commas as plain numbers, in place, where some cell shows what a comma means.

  One cell decides for the whole table: 1,234 alone may be either number, but not beside 3,74.
  """
  try:
    mark = cells.decimal_mark(cell for row in rows for cell in row.values())
  except ValueError as error:
    raise RowError(f'{path} has {error}: write all numbers in one way.') from None
  if mark is None:
    return
  remarks.append('decimal commas' if mark == cells.DECIMAL_COMMA else 'commas between thousands')
  for row in rows:
    row.update({name: cells.plain(cell, mark) for name, cell in row.items() if ',' in cell})
