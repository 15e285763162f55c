"""Turns the flags of `research.fit` into arguments of `fit_results`, `fit_law` and `selection`."""

import argparse
import dataclasses
import importlib
import inspect
import math
import sys
from collections.abc import Callable

from research.core import configs
from research.core.errors import UserError, did_you_mean
from research.scaling import cells, laws
from research.scaling.columns import Columns
from research.scaling.fitting import fit_results
from research.scaling.laws.base import Law
from research.scaling.options import Options

# Flags that are fields of `Columns`.
COLUMNS = ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role')
COLUMNS += ('params_unit', 'tokens_unit', 'flops_unit', 'loss_unit')
# Flags that are arguments of `fit_results`, and their names there.
OPTIONS = {
  'profile': 'profile', 'noise': 'noise', 'robust': 'robust', 'delta': 'delta', 'tau': 'tau',
  'starts': 'starts', 'residuals': 'residuals', 'drop_highest': 'drop_highest',
  'bootstrap': 'replicates', 'resample': 'resample', 'level': 'level', 'seed': 'seed', 'rule': 'rule',
}  # fmt: skip
# The first float above 0, the last one below 1, and the last one below infinity.
ABOVE_0, BELOW_1, FINITE = math.nextafter(0, 1), math.nextafter(1, 0), sys.float_info.max
# The range of each number, ends included, and how to say it.
RANGES = {
  'level': (ABOVE_0, BELOW_1, 'between 0 and 1, such as 0.9'),
  'tau': (ABOVE_0, BELOW_1, 'between 0 and 1; 0.5 is symmetric'),
  'delta': (ABOVE_0, FINITE, 'positive, such as 1e-3'),
  'noise': (ABOVE_0, FINITE, 'positive, in nats'),
  'drop_highest': (0, FINITE, 'zero or more'),
  'bootstrap': (1, 1_000_000, 'from 1 to 1000000'),
  'seed': (0, 2**32 - 1, 'zero or more'),
}


def options(flags: argparse.Namespace, default: Callable) -> dict:
  """The arguments of `fit_results`: those of the gin files, which flags on the command line replace.

  Args:
    default: `default(name)` is the value of a flag that is not on the command line.

  Raises:
    UserError: a flag is out of range or unreadable, or the gin files bind no `FIT`.
  """
  for name, (low, high, condition) in RANGES.items():
    value = getattr(flags, name)
    if value is not None and not low <= value <= high:
      raise UserError(f'--{name}={value} must be {condition}.')
  if bad := [budget for budget in flags.forecast if not 0 < budget < float('inf')]:
    raise UserError(f'--forecast={bad[0]} must be a positive number of FLOPs.')
  chosen = {}
  if flags.gin_file or flags.gin:
    fit = configs.load(flags.gin_file, flags.gin, root='FIT').tree()
    if getattr(fit, 'func', fit) is not fit_results:
      raise UserError(f'{(flags.gin_file or ["--gin"])[-1]}: FIT must be @fitting.fit_results.')
    chosen = dict(getattr(fit, 'keywords', {}))
  changed = {name: value for name, value in vars(flags).items() if value != default(name)}
  chosen |= {OPTIONS[name]: value for name, value in changed.items() if name in OPTIONS}
  columns = {name: value for name, value in changed.items() if name in COLUMNS}
  if flags.input:
    columns['inputs'] = pairs('--input', flags.input, str)
  if columns:
    chosen['columns'] = dataclasses.replace(chosen.get('columns', Columns()), **columns)
  if 'law' in changed:
    chosen['law'] = law(flags.law)
  for flag, name, kind in (('fix', 'fixed', float), ('tie', 'tied', str)):
    if items := getattr(flags, flag):
      chosen[name] = {**(chosen.get(name) or {}), **pairs(f'--{flag}', items, kind)}
  if flags.strict:
    chosen['strict'] = True
  if 'all' in flags.pick:
    chosen['checkpoints'] = True
  return chosen | ({'role': None} if flags.all_rows else {})


def law(name: str) -> Law:
  """A law of the library by its name, in any case, or a law of your own as module.Class.

  Raises:
    UserError: there is no such law or module, or the law needs arguments.
  """
  if '.' not in name:
    return laws.by_name(name)
  module_name, _, attribute = name.rpartition('.')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # The module itself may be missing, or one that it imports.
    if error.name and not (module_name == error.name or module_name.startswith(f'{error.name}.')):
      raise UserError(
        f'--law={name}: {module_name} imports {error.name}, which is not installed.'
      ) from None
    raise UserError(
      f'--law={name}: there is no module {module_name!r}; start in the folder that holds it, or '
      'put that on PYTHONPATH.'
    ) from None
  except Exception as error:
    raise UserError(f'--law={name}: importing {module_name} failed: {error!r}.') from None
  classes = inspect.getmembers(module, inspect.isclass)
  kinds = {name: kind for name, kind in classes if issubclass(kind, Law) and kind is not Law}
  if attribute not in kinds:
    raise UserError(
      f'--law={name}: {module_name} has no law {attribute!r}.{did_you_mean(attribute, kinds)}'
    )
  try:
    return kinds[attribute]()
  except TypeError as error:
    raise UserError(
      f'--law={name}: {attribute} needs arguments ({error}); bind it in a gin file.'
    ) from None


def list_laws() -> str:
  """Every law of the library, each on a line, and how to name an input or your own law."""
  lines = [
    f'{law.name:24s} {law.output} = {law.form}   [{", ".join(law.inputs)}]'
    for law in laws.standard()
  ]
  return '\n'.join(
    [
      *lines,
      'An input is the column of its name, or --input NAME=COLUMN; your own law is --law=module.Class.',
    ]
  )


def is_of_params_and_tokens(law: Law) -> bool:
  """Whether the law can split a budget. Such laws have approaches, exponents and forecasts."""
  return set(law.inputs) == {'params', 'tokens'} and law.output == 'loss'


def of_a_law(chosen: dict) -> dict:
  """Arguments of `fit_results` as arguments of `any_law.fit_law`."""
  names = {field.name for field in dataclasses.fields(Options)}
  options = Options(**{name: value for name, value in chosen.items() if name in names})
  rest = {name: chosen[name] for name in ('columns', 'role') if name in chosen}
  return {'law': options.law, 'options': options, **rest}


def pairs(flag: str, items: list[str], kind: Callable) -> dict:
  """['a=1'] as {'a': kind('1')}; raises UserError for an item that is not NAME=VALUE or a name twice."""
  result = {}
  for item in items:
    name, equals, value = item.partition('=')
    if name in result:
      raise UserError(f'{flag}={item}: {name} is given twice; give it once.')
    try:
      result[name] = kind(value)
    except ValueError:
      equals = ''
    if not equals or not name or value == '':
      raise UserError(f'{flag}={item} is not NAME=VALUE.')
  return result


def points(items: list[str], flag: str = '--predict') -> list[dict[str, float]]:
  """['params=1e9,tokens=2e10'] as [{'params': 1e9, 'tokens': 2e10}]."""
  return [pairs(flag, item.split(','), float) for item in items]


def number_or_column(text: str) -> float | str:
  """A flag that is either a number or the name of a column."""
  return cells.number(text) if cells.is_number(text) else text
