"""Results as rows: reading anybody's table, finding its columns, checking its units."""

import collections
import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import UserError, did_you_mean

# N, C as this project writes them, in the order in which a convention is chosen by default.
PARAMS = ('params_with_head', 'params_total', 'params_non_embedding')
FLOPS = (
  'flops_6n_with_head',
  'flops_6n_non_embedding',
  'flops_attention_causal',
  'flops_attention_full',
  'flops_chinchilla',
)
# Names under which other people's tables hold a quantity, compared without case, spaces or underscores.
ALIASES = {
  'params': (*PARAMS, 'params', 'parameters', 'n', 'n params', 'num params', 'model size', 'model params'),
  'tokens': ('tokens', 'd', 't', 'n tokens', 'num tokens', 'training tokens', 'train tokens'),
  'flops': (*FLOPS, 'flops', 'c', 'compute', 'flop', 'training flop', 'training flops', 'train flops'),
  'loss': ('loss', 'l', 'val loss', 'loss val', 'validation loss', 'eval loss', 'test loss', 'final loss'),
  'budget': ('budget', 'isoflop', 'flops budget', 'flop budget'),
  'run': ('run', 'name', 'id', 'run id', 'run name'),
  'status': ('status', 'state'),
  'role': ('role',),
}  # fmt: skip
DONE = ('finished', 'done', 'complete', 'completed', 'success', 'ok', '')


class RowError(UserError, ValueError):
  """A table that cannot be fitted as it stands: the message names the row and the column."""


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which column holds what (None: found by name), and the units of its numbers.

  `params_unit` and so on are what one unit in the table is worth: 1e9 for a column in billions.
  `loss_unit` is 'nats' or 'bits', per token in either case.
  """

  params: str | None = None
  tokens: str | None = None
  flops: str | None = None
  loss: str | None = None
  budget: str | None = None
  run: str | None = None
  status: str | None = None
  role: str | None = None
  params_unit: float = 1.0
  tokens_unit: float = 1.0
  flops_unit: float = 1.0
  loss_unit: str | None = None


@dataclasses.dataclass(frozen=True)
class Observations:
  """The rows that count, as arrays [rows]; `excluded` holds (run, why) for the others.

  `budget` is the isoFLOP group's target C, NaN for a row of no group. `columns` says where each came from.
  """

  run: np.ndarray
  params: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  budget: np.ndarray
  excluded: tuple[tuple[str, str], ...] = ()
  columns: dict[str, str] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.loss)

  def take(self, keep) -> 'Observations':
    """The rows of a mask or an index."""
    arrays = {name: getattr(self, name)[keep] for name in ARRAYS}
    return dataclasses.replace(self, **arrays)

  @property
  def inputs(self) -> dict[str, np.ndarray]:
    return {'params': self.params, 'tokens': self.tokens, 'flops': self.flops}


ARRAYS = ('run', 'params', 'tokens', 'flops', 'loss', 'budget')


def read_table(path) -> list[dict]:
  """The rows of a .csv, .jsonl, .json (a list of objects) or .parquet file."""
  path = pathlib.Path(path)
  if not path.is_file():
    beside = [p.name for p in path.parent.glob('*')] if path.parent.is_dir() else []
    raise RowError(f'{path} is not a file.{did_you_mean(path.name, beside)}')
  if path.suffix == '.parquet':
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()
  if path.suffix == '.jsonl':
    lines = path.read_text().splitlines()
    return [_parse(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
  if path.suffix == '.json':
    rows = _parse(path, 1, path.read_text())
    if not isinstance(rows, list):
      raise RowError(f'{path} holds no list of rows.')
    return rows
  with path.open(newline='', encoding='utf-8-sig') as f:
    return list(csv.DictReader(f))


def _parse(path, line, text):
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    raise RowError(f'{path}:{line} is not JSON: {e.msg}.') from None


def observe(
  rows: Iterable[Mapping], columns: Columns = Columns(), role: str | None = 'fit'
) -> Observations:
  """Rows as `Observations`.

  Left out and listed: rows of another `role`, rows whose status is not a finished one, losses that are NaN
  or infinite, and repeats of a row. Refused with the row and the column: a missing, unreadable, zero or
  negative number in a finished row, and numbers whose units cannot be right. Where there is no tokens column,
  D = C / (6 N); where there is no FLOPs column, C = 6 N D.
  """
  rows = list(rows)
  if not rows:
    raise RowError('The table has no rows.')
  found = find_columns(rows, columns)
  kept, excluded, seen = [], [], {}
  for i, row in enumerate(rows):
    run = str(row.get(found.get('run'), '') or f'row {i + 1}')
    reason = _why_not(row, found, role)
    if reason is None:
      numbers = _numbers(row, found, columns, f'row {i + 1} ({run})')
      reason = None if math.isfinite(numbers['loss']) else f'its loss is {numbers["loss"]}'
    if reason is None:
      key = tuple(numbers.values()) + ((run,) if 'run' in found else ())
      reason = f'it repeats {seen[key]}' if key in seen else None
      seen.setdefault(key, run)
    if reason is None:
      kept.append({'run': run, **numbers})
    else:
      excluded.append((run, reason))
  if not kept:
    counted = collections.Counter(why for _, why in excluded).most_common(1)[0]
    raise RowError(
      f'No row is left to fit: of {len(rows)}, {counted[1]} left out because {counted[0]}.'
    )
  arrays = {name: np.array([row[name] for row in kept]) for name in ARRAYS}
  _check_units(arrays, found)
  return Observations(**arrays, excluded=tuple(excluded), columns=found)


def find_columns(rows: list[Mapping], columns: Columns) -> dict[str, str]:
  """quantity -> column name."""
  names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
  plain = lambda name: str(name).lower().replace('_', '').replace(' ', '').replace('-', '')
  by_plain = {plain(name): name for name in reversed(names)}
  found = {}
  for quantity, aliases in ALIASES.items():
    asked = getattr(columns, quantity)
    if asked is not None:
      if asked not in names:
        raise RowError(f'There is no column {asked!r} for {quantity}.{did_you_mean(asked, names)}')
      found[quantity] = asked
      continue
    hit = next((by_plain[plain(a)] for a in aliases if plain(a) in by_plain), None)
    if hit is not None:
      found[quantity] = hit
  missing = [q for q in ('params', 'loss') if q not in found]
  if 'tokens' not in found and 'flops' not in found:
    missing.append('tokens (or flops)')
  if missing:
    raise RowError(
      f'The table has no column for {", ".join(missing)}; a fit needs N (params), D (tokens) or C (flops), '
      f'and the loss in nats per token. Name them with --params=COLUMN and so on; columns: '
      f'{", ".join(names)}.'
    )
  return found


def _why_not(row, found, role) -> str | None:
  status = str(row.get(found.get('status'), '') or '').strip().lower()
  if status not in DONE:
    return f'its status is {status!r}'
  its = str(row.get(found.get('role'), '') or '')
  if role is not None and its and its != role:
    return f'its role is {its!r}'
  return None


def _numbers(row, found, columns: Columns, where: str) -> dict[str, float]:
  """N, D, C, loss (nats) and budget of one row."""

  def number(quantity, unit=1.0):
    column = found[quantity]
    text = row.get(column)
    if text is None or str(text).strip() == '':
      raise RowError(f'{where} has no {column}; give it a number, or a status other than finished.')
    try:
      value = float(text) * unit
    except (TypeError, ValueError):
      raise RowError(f'{where}: {column} is {text!r}, which is not a number.') from None
    if value <= 0 or (quantity != 'loss' and not math.isfinite(value)):
      raise RowError(f'{where}: {column} is {text}; it must be positive.')
    return value

  out = {'params': number('params', columns.params_unit)}
  out['loss'] = number('loss', math.log(2) if _loss_unit(found, columns) == 'bits' else 1.0)
  if 'tokens' in found:
    out['tokens'] = number('tokens', columns.tokens_unit)
    out['flops'] = (
      number('flops', columns.flops_unit) if 'flops' in found else 6 * out['params'] * out['tokens']
    )
  else:
    out['flops'] = number('flops', columns.flops_unit)
    out['tokens'] = out['flops'] / (6 * out['params'])
  budget = str(row.get(found.get('budget'), '') or '').strip()
  out['budget'] = float(budget) if budget else math.nan
  return out


def _loss_unit(found, columns: Columns) -> str:
  name = found['loss'].lower()
  if columns.loss_unit not in (None, 'nats', 'bits'):
    raise RowError(f'loss_unit={columns.loss_unit!r} is neither nats nor bits (per token).')
  if columns.loss_unit is None and ('bpb' in name or 'bit' in name or 'byte' in name):
    raise RowError(
      f'Column {found["loss"]!r} looks like bits or a loss per byte, and a fit wants nats per token: '
      'choose the loss column, or pass loss_unit=bits if it is bits per token.'
    )
  return columns.loss_unit or 'nats'


def _check_units(a: dict[str, np.ndarray], found: dict[str, str]) -> None:
  """Errors for numbers that only make sense in other units."""
  if np.median(a['loss']) > 20:
    raise RowError(
      f'Column {found["loss"]!r} has a median of {np.median(a["loss"]):.3g}: is it a perplexity? '
      'A fit wants nats per token (the logarithm of the perplexity).'
    )
  if 'tokens' in found and 'flops' in found:
    ratio = float(np.median(a['flops'] / (6 * a['params'] * a['tokens'])))
    thousands = round(math.log10(ratio) / 3)
    if thousands and abs(math.log10(ratio) - 3 * thousands) < 0.8:
      raise RowError(
        f'{found["flops"]} is {ratio:.1e} times 6 {found["params"]} {found["tokens"]}: '
        f'one of them is in other units; pass params_unit, tokens_unit or flops_unit '
        f'(1e{abs(3 * thousands)}).'
      )
  for name, least in (('params', 1e3), ('tokens', 1e4)):
    if name in found and a[name].max() < least:
      raise RowError(
        f'Column {found[name]!r} has no value above {a[name].max():.4g}: is it in millions or billions? '
        f'Pass {name}_unit=1e6 or 1e9.'
      )


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
