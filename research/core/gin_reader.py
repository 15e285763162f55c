"""Reads the text of gin files: which statements it has, and what the names in them mean.

The grammar is gin-config's own, in the style of its dynamic registration: a file imports the modules whose
classes it configures. `research.core.configs` collects the bindings and makes objects of them.
"""

import dataclasses
import importlib
import io
import pathlib
import pkgutil
import re
import sys
import tokenize
from collections.abc import Iterator
from typing import Any

from gin import config_parser

from research.core import moved
from research.core.errors import UserError, did_you_mean, failure

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/selector`, which `call` calls: `@scope/selector()`."""

  scope: str
  selector: str
  call: bool


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%name`."""

  name: str


class _Delegate(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    scope, _, selector = scoped_configurable_name.rpartition('/')
    return Reference(scope, selector, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


class Names:
  """What the names in one file mean: its imports, as dotted Python paths.

  Names of the layout before the present one are read as their present ones; `moved` collects them.
  """

  def __init__(self, paths: dict[str, str] | None = None):
    self.paths = dict(paths or {})
    self.moved: dict[str, str] = {}

  def copy(self) -> 'Names':
    return Names(self.paths)

  def add(self, statement: config_parser.ImportStatement, where: str) -> None:
    """Imports what an import statement names.

    Raises:
      UserError: there is no such module, or it cannot be imported.
    """
    name = statement.bound_name()
    path = statement.module if statement.is_from or statement.alias else name
    _module(statement.module, where)
    self.paths[name] = path

  def path(self, selector: str) -> str:
    """The present dotted path that a selector stands for; its first name must be known."""
    first, dot, rest = selector.partition('.')
    path = self.paths[first] + dot + rest
    current = moved.current_path(path)
    if current != path:
      self.moved[path] = current
    return current

  def find(self, selector: str, where: str):
    """The class or function that a selector names.

    Raises:
      UserError: it is not imported, not there, or neither a class nor a function.
    """
    first = selector.partition('.')[0]
    if first not in self.paths:
      raise UserError(
        f'{where}: {first!r} is not imported in this file (from a.b import {first}).'
        + did_you_mean(first, self.paths)
      )
    target = _look_up(self.path(selector), where)
    if not callable(target):
      raise UserError(f'{where}: {selector} is not a class or a function.')
    return target


def _module(path: str, where: str):
  """The module at a path, or where it moved to."""
  path = moved.current_path(path)
  try:
    return importlib.import_module(path)
  except ModuleNotFoundError as error:
    missing = error.name or path
    if path != missing and not path.startswith(missing + '.'):
      raise UserError(f'{where}: importing {path} failed: {failure(error)}.') from error
    parent, _, name = missing.rpartition('.')
    siblings = getattr(sys.modules.get(parent), '__path__', None)
    near = (
      did_you_mean(name, [module.name for module in pkgutil.iter_modules(siblings)])
      if siblings
      else ''
    )
    raise UserError(f'{where}: no Python module {path!r} to import.{near}') from None
  except (Exception, SystemExit) as error:  # whatever the code of the module does
    raise UserError(f'{where}: importing {path} failed: {failure(error)}.') from error


def _is_module(path: str) -> bool:
  return path in sys.modules or path in moved.PRESENT_MODULES


def _look_up(path: str, where: str):
  """The object at a dotted path: modules as far as they are imported, then attributes."""
  parts = path.split('.')
  count = len(parts)
  while count > 1 and not _is_module('.'.join(parts[:count])):
    count -= 1
  target = _module('.'.join(parts[:count]), where)
  for name in parts[count:]:
    try:
      target = getattr(target, name)
    except AttributeError:
      public = [public for public in dir(target) if not public.startswith('_')]
      near = did_you_mean(name, public)
      hint = near if near.startswith(' Did') else ''
      owner = getattr(target, '__name__', path)
      raise UserError(f'{where}: {owner} has no {name!r}.{hint}') from None
  return target


@dataclasses.dataclass
class Binding:
  """A value, as the parser gives it, with what its names mean and where it stands."""

  value: Any
  names: Names
  where: str
  used: bool = False


def references(value) -> Iterator[Reference]:
  """Every reference in a value, at any depth."""
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, dict):
    for key, part in value.items():
      yield from references(key)
      yield from references(part)
  elif isinstance(value, list | tuple):
    for part in value:
      yield from references(part)


def find_file(name: str, where: str | None = None) -> pathlib.Path:
  """A gin file by its path from the current folder, or else from the project's root.

  Raises:
    UserError: there is none.
  """
  prefix = f'{where}: ' if where else ''
  for path in (pathlib.Path(name).expanduser(), ROOT / name):
    try:
      if path.is_file():
        return path
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte, no such user
      continue
  known = [shown(path) for path in sorted((ROOT / 'gin').rglob('*.gin'))]
  hint = did_you_mean(name, known)
  raise UserError(f'{prefix}no gin file {name!r}.{hint if hint.startswith(" Did") else ""}')


def shown(path: pathlib.Path) -> str:
  """The name of a file in messages: from the project's root where it is in the project."""
  path = path.resolve()
  return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_text(path: pathlib.Path) -> str:
  """The text of a gin file, which is UTF-8; a byte order mark of UTF-8 is left out.

  Raises:
    UserError: the file cannot be read, or is in another encoding.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'{shown(path)}: cannot be read ({error.strerror}).') from None
  if data.startswith((b'\xff\xfe', b'\xfe\xff')):
    raise UserError(f'{shown(path)}: this file is UTF-16; save it as UTF-8.')
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b'\n') + 1
    byte = data[error.start]
    raise UserError(
      f'{shown(path)}:{line}: this file is not UTF-8 (byte 0x{byte:02x}); save it as UTF-8.'
    ) from None
  if '\0' in text:
    line = text[: text.index('\0')].count('\n') + 1
    raise UserError(f'{shown(path)}:{line}: this is not a gin file: it has a NUL byte.')
  # As Python reads text: the lines of Windows and of old Macs end like ours.
  return text.replace('\r\n', '\n').replace('\r', '\n')


def statements(text: str, source: str, one_line: bool = False) -> Iterator:
  """The statements of a gin text, in order.

  Args:
    text: what to read.
    source: how a message names it.
    one_line: it is a binding of the command line, whose line number says nothing.

  Raises:
    UserError: it is not gin; with the line.
  """
  place = lambda line: source if one_line or line is None else f'{source}:{line}'
  try:
    parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
    yield from parser
    if (
      parser.current_token.type != tokenize.ENDMARKER
    ):  # the parser stops quietly at some ends of a text
      raise UserError(f'{place(parser.current_token.start[0])}: this line is cut short.')
  except SyntaxError as error:  # also IndentationError
    # The parser's first line is Python's own about its syntax tree; its last says what it could not read.
    why = (error.msg or 'not gin').splitlines()[-1].strip().rstrip('.')
    hint = ' (a string needs quotes)' if 'token' in why else ''
    raise UserError(f'{place(error.lineno)}: {why}{hint}.') from None
  except tokenize.TokenError as error:
    why, (line, _) = error.args
    raise UserError(f'{place(line)}: this is not gin syntax ({why}).') from None
  except (RecursionError, MemoryError):
    raise UserError(f'{source}: brackets are nested too deeply.') from None
  except (
    TypeError,
    ValueError,
  ) as error:  # a dict whose key is a list, a number that Python does not take
    raise UserError(
      f'{place(parser.current_token.start[0])}: this value cannot be read ({error}).'
    ) from None


def qualify(text: str, find) -> str:
  """A binding of the command line as a gin file would say it: names with their module, and its imports.

  Args:
    text: `name = value`.
    find: the class or function of a bare name.
  """
  modules = {}

  def full(selector):
    target = find(selector)
    modules[target.__module__] = None
    return f'{target.__module__}.{target.__qualname__}'

  name, _, value = text.partition('=')
  scope, _, selector = name.strip().rpartition('/')
  if '.' in selector:
    selector, _, argument = selector.rpartition('.')
    name = f'{scope}/{full(selector)}.{argument}'.lstrip('/')
  value = _replace_references(value, full)
  imports = ''.join(f'import {module}\n' for module in modules)
  return f'{imports}{name.strip()} = {value.strip()}\n'


def _replace_references(value: str, full) -> str:
  """`value` with `full(selector)` for the selector of every reference outside strings."""
  parts = re.split(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", value)
  reference = r'@((?:\w+/)*)(\w+(?:\.\w+)*)'
  parts[::2] = [
    re.sub(reference, lambda match: f'@{match[1]}{full(match[2])}', part) for part in parts[::2]
  ]
  return ''.join(parts)
