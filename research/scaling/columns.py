"""Finds the columns of a table and their units by the names that papers and loggers give them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from research.core.errors import did_you_mean
from research.scaling import cells
from research.scaling.cells import RowError

# N and C as this project writes them. Where a table has several, the first of these is the default.
PARAMS = ('params_with_head', 'params_total', 'params_non_embedding')
FLOPS = (
  'flops_6n_with_head',
  'flops_6n_non_embedding',
  'flops_attention_causal',
  'flops_attention_full',
  'flops_chinchilla',
)
# The count of N that belongs to each count of C.
CONVENTIONS = {
  'flops_6n_non_embedding': 'params_non_embedding',
  'flops_6n_with_head': 'params_with_head',
  'flops_attention_causal': 'params_with_head',
  'flops_attention_full': 'params_with_head',
  'flops_chinchilla': 'params_total',
}
# Names of a quantity's column, without case and punctuation, in groups. A group is tried before the next one;
# two columns of the same group that differ are ambiguous.
ALIASES = {
  'params': (
    *((name,) for name in PARAMS),
    ('params', 'parameters', 'n', 'n params', 'num params', 'model size', 'model params', 'parameter count',
     'param count', 'n parameters', 'num parameters', 'number of parameters', 'model parameters'),
    ('total params', 'total parameters', 'params total'),
    ('non embedding params', 'non embedding parameters', 'params no emb', 'n no emb', 'n non embedding'),
  ),
  'tokens': (
    ('tokens', 'd', 'n tokens', 'num tokens', 'training tokens', 'train tokens', 'tokens trained',
     'trained tokens', 'num training tokens', 'num train tokens', 'n train tokens', 'total tokens',
     'tokens seen', 'number of tokens', 'dataset tokens'),
    ('t',),
  ),
  'flops': (
    *((name,) for name in FLOPS),
    ('flops', 'c', 'compute', 'flop', 'training flop', 'training flops', 'train flops', 'total flops',
     'training compute', 'train compute', 'total training flops', 'compute flops'),
  ),
  'loss': (
    ('loss', 'val loss', 'loss val', 'validation loss', 'eval loss', 'test loss', 'final loss', 'dev loss',
     'cross entropy', 'val cross entropy', 'validation cross entropy', 'nll', 'val nll'),
    ('l',),
  ),
  'budget': (('budget', 'isoflop', 'flops budget', 'flop budget', 'compute budget'),),
  'run': (('run', 'run id', 'run name'), ('name',), ('id',)),
  'status': (('status', 'state'),),
  'role': (('role',),),
}  # fmt: skip
QUANTITIES = ('params', 'tokens', 'flops', 'loss')
LOSS_UNITS = ('nats', 'bits', 'perplexity')
UNITS = {
  'k': 1e3, 'thousand': 1e3, 'thousands': 1e3, 'm': 1e6, 'mn': 1e6, 'million': 1e6, 'millions': 1e6,
  'b': 1e9, 'bn': 1e9, 'g': 1e9, 'billion': 1e9, 'billions': 1e9, 't': 1e12, 'tn': 1e12, 'trillion': 1e12,
  'trillions': 1e12, 'flops': 1.0, 'flop': 1.0, 'tokens': 1.0, 'params': 1.0, 'parameters': 1.0,
  'pfdays': cells.PF_DAYS, 'petaflopdays': cells.PF_DAYS, 'petaflopsdays': cells.PF_DAYS,
  'pflopsdays': cells.PF_DAYS, 'pflopdays': cells.PF_DAYS, 'petaflopsdaysdays': cells.PF_DAYS,
  **{f'{prefix}flop{s}': value for prefix, value in cells.PREFIXES.items() for s in ('', 's')},
}  # fmt: skip
SPELT_OUT = {'giga': 'g', 'tera': 't', 'peta': 'p', 'exa': 'e', 'zetta': 'z'}


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of the quantities, and the units of their numbers.

  Attributes:
    params, tokens, flops, loss, budget, run, status, role: names of columns; None to find one by its name.
    params_unit, tokens_unit, flops_unit: what a 1 in the column stands for: 1e9 for a column in billions.
    loss_unit: 'nats' or 'bits', both per token, or 'perplexity'; None to read it from the column's name.
    inputs: the columns of a law's other inputs, such as {'unique_tokens': 'U'}.
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
  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in ('params_unit', 'tokens_unit', 'flops_unit'):
      if not 0 < getattr(self, name) < float('inf'):
        raise RowError(f'{name}={getattr(self, name)!r} must be a positive number, such as 1e9.')
    if self.loss_unit not in (None, *LOSS_UNITS):
      raise RowError(f'loss_unit={self.loss_unit!r} is not one of {", ".join(LOSS_UNITS)}.')


def bare(name: str) -> str:
  """A column's name without case and punctuation: 'eval/Loss' -> 'evalloss'."""
  return re.sub(r'[\s_\-/.:]+', '', str(name).lower())


def base_and_unit(name: str) -> tuple[str, str | None]:
  """The name and the unit in a column's name: ('tokens', 'b') of 'Tokens (B)', ('tokens', None) of 'tokens'."""
  text = str(name).strip()
  if match := re.fullmatch(r'(.*\S)\s*[(\[]([^()\[\]]*)[)\]]', text):
    return bare(match.group(1)), re.sub(r'[^a-z0-9^]', '', match.group(2).lower())
  if match := re.fullmatch(r'(.*?)[\s_]*pf(?:lops?)?[\s_-]*days?', text, re.IGNORECASE):
    return bare(match.group(1)) or 'compute', 'pfdays'
  for long, short in SPELT_OUT.items():
    text = re.sub(rf'{long}(?=flop)', short, text, flags=re.IGNORECASE)
  if match := re.fullmatch(r'(.*?)([gtpez])(flops?)', text, re.IGNORECASE):
    before = match.group(1)
    if (
      not before or before[-1] in ' _-/.'
    ):  # 'total_gflops', but not a word that ends in these letters
      return bare(before + match.group(3)), bare(match.group(2) + match.group(3))
  if match := re.fullmatch(
    r'(.*?)(?:[\s_]+in)?[\s_]+(k|m|b|t|g|bn|mn|thousands?|millions?|billions?|trillions?)',
    text,
    re.IGNORECASE,
  ):
    return bare(match.group(1)), match.group(2).lower()
  return bare(text), None


def unit_of(text: str | None) -> float | None:
  """What a unit in a column's name stands for, 1e9 for 'b'; 1 without a unit; None for an unknown one."""
  if text is None:
    return 1.0
  if match := re.fullmatch(r'(?:x)?(?:1e|10\^|1e\+)(\d+)', text):
    return 10.0 ** int(match.group(1))
  return UNITS.get(text)


def resolve(wanted: str, names: Iterable[str], what: str) -> str:
  """The column of the name `wanted`, as it stands or without case and punctuation.

  Args:
    what: the quantity, for the message.

  Raises:
    RowError: there is no such column, or several differ only in case and punctuation.
  """
  names = list(names)
  if wanted in names:
    return wanted
  matches = [name for name in names if bare(name) == bare(wanted)]
  if len(matches) != 1:
    raise RowError(f'There is no column {wanted!r} for {what}.{did_you_mean(wanted, names)}')
  return matches[0]


def column_names(rows: Iterable[Mapping]) -> list[str]:
  """The names of all columns, in the order in which the rows first have them."""
  return list(dict.fromkeys(str(name) for row in rows for name in row if name is not None))


def find(rows: list[Mapping], columns: Columns, quantity: str) -> str | None:
  """The column of a quantity: the one that `columns` names, or one found by its name; None where there is none.

  Raises:
    RowError: `columns` names no column of the table, or two columns fit and differ.
  """
  names = column_names(rows)
  named = getattr(columns, quantity)
  if named is not None:
    return resolve(named, names, quantity)
  for group in ALIASES[quantity]:
    group = {bare(alias) for alias in group}
    matches = [name for name in names if _is_called(name, group, quantity)]
    if not matches:
      continue
    if quantity in QUANTITIES:
      # A logger may write a column and leave it empty.
      matches = [name for name in matches if _has_values(rows, name)] or matches
      _check_alike(rows, matches, quantity)
    # A column t may be time, and l layers: only the values tell.
    if matches[0].lower() in ('t', 'l') and not _is_plausible(rows, matches[0], quantity):
      continue
    return matches[0]
  return _any_loss(rows, names) if quantity == 'loss' else None


def _is_called(name: str, aliases: set[str], quantity: str) -> bool:
  """Whether a column's name is an alias, perhaps with a unit (tokens_b) or a group before it (train/tokens)."""
  if bare(name) in aliases:
    return True
  if quantity not in QUANTITIES:
    return False
  base, unit = base_and_unit(name)
  # 'train/tokens' and the like, as loggers group their metrics.
  last = base_and_unit(str(name).rsplit('/', 1)[-1])[0] if '/' in str(name) else base
  if quantity == 'loss' and unit is not None:
    return base in aliases and unit.startswith(('nat', 'bit', 'perplexity', 'ppl'))
  if quantity == 'loss':
    return False
  return (base in aliases or last in aliases) and unit_of(unit) is not None


def _has_values(rows, name: str) -> bool:
  return any(not cells.is_blank(row.get(name)) for row in rows)


def _any_loss(rows, names: list[str]) -> str | None:
  """The column whose name ends in 'loss': of a corpus (c4_loss), or if there is no other of training."""
  losses = [name for name in names if bare(name).endswith('loss') and _has_values(rows, name)]
  matches = [name for name in losses if 'train' not in bare(name)] or losses
  if matches:
    _check_alike(rows, matches, 'loss')
  return matches[0] if matches else None


def _check_alike(rows, matches: list[str], quantity: str) -> None:
  """Raises RowError where two columns that both fit a quantity differ by more than rounding."""
  for other in matches[1:]:
    for row in rows:
      pair = row.get(matches[0]), row.get(other)
      if any(cells.is_blank(cell) or not cells.is_number(cell) for cell in pair):
        continue
      first, second = (cells.number(cell) for cell in pair)
      if abs(first - second) > 1e-3 * abs(first):
        raise RowError(
          f'The columns {matches[0]!r} and {other!r} may both be the {quantity}, and they differ; say '
          f'which one with --{quantity}={matches[0]!r} or --{quantity}={other!r}.'
        )


def _is_plausible(rows, name: str, quantity: str) -> bool:
  """Whether a column called t has tokens and not times, or one called l losses and not numbers of layers."""
  values = [cells.number(row[name]) for row in rows if name in row and cells.is_number(row[name])]
  if not values:
    return False
  if quantity == 'loss':
    return max(values) < 20 and any(value != int(value) for value in values)
  return max(values) >= 1e6


def scale_of(column: str, quantity: str, columns: Columns) -> float:
  """What a 1 in a column of N, D or C stands for, by `columns` or else by the unit in the column's name."""
  unit = getattr(columns, f'{quantity}_unit')
  if unit != 1.0:
    return unit
  # A name of the list has no unit in it.
  if bare(column) in {bare(alias) for group in ALIASES[quantity] for alias in group}:
    return 1.0
  return unit_of(base_and_unit(column)[1]) or 1.0


def loss_unit(column: str, columns: Columns) -> str:
  """The unit of a column of losses: 'nats', 'bits' or 'perplexity'.

  Raises:
    RowError: the name suggests another unit than nats, and `columns` has none.
  """
  if columns.loss_unit is not None:
    return columns.loss_unit
  unit = base_and_unit(column)[1] or ''
  if unit in ('bits', 'bit', 'bitstoken', 'bitspertoken'):
    return 'bits'
  name = column.lower()
  if 'ppl' in name or 'perplexity' in name:
    raise RowError(
      f'Column {column!r} looks like a perplexity, and a fit wants nats per token: pass '
      '--loss_unit=perplexity, and its logarithm is taken.'
    )
  if 'bpb' in name or 'bit' in name or 'byte' in name:
    raise RowError(
      f'Column {column!r} looks like bits or a loss per byte, and a fit wants nats per token: '
      'choose the loss column, or pass loss_unit=bits if it is bits per token.'
    )
  return 'nats'


def missing(wanted: Iterable[str], rows: list[Mapping]) -> RowError:
  """The error for quantities without a column, with a hint where another column may be meant."""
  names = column_names(rows)
  hints = [name for name in names if 'ppl' in name.lower() or 'perplexity' in name.lower()]
  hint = (
    f' {hints[0]!r} looks like a perplexity: --loss={hints[0]!r} --loss_unit=perplexity.'
    if hints
    else ''
  )
  times = [name for name in names if name.lower() in ('t', 'l')]
  if times:
    hint += f' {" and ".join(map(repr, times))} may be tokens, time, a loss or layers: name what they are.'
  return RowError(
    f'The table has no column for {", ".join(wanted)}; a fit needs N (params), D (tokens) or C '
    '(flops), and the loss in nats per token. Name them with --params=COLUMN and so on; columns: '
    f'{", ".join(names)}.{hint}'
  )
