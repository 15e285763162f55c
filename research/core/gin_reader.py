"""Reads the text of gin files: their statements, and the classes and functions that their names refer to.

The grammar is that of gin-config with dynamic registration: a file imports the modules whose classes it
configures. `research.core.configs` collects the bindings and makes objects from them.
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
  """The imports of a file: dotted Python paths by name.

  Names of earlier versions are read as the present ones; `moved` collects them.
  """

  def __init__(self, paths: dict[str, str] | None = None):
    self.paths = dict(paths or {})
    self.moved: dict[str, str] = {}

  def copy(self) -> 'Names':
    return Names(self.paths)

  def add(self, statement: config_parser.ImportStatement, where: str) -> None:
    """Imports the module or the name of an import statement.

    Raises:
      UserError: there is no such module, or it cannot be imported.
    """
    name = statement.bound_name()
    path = statement.module if statement.is_from or statement.alias else name
    _module(statement.module, where)
    self.paths[name] = path

  def path(self, selector: str) -> str:
    """Returns the present dotted path of a selector; its first name must be known."""
    first, dot, rest = selector.partition('.')
    path = self.paths[first] + dot + rest
    current = moved.current_path(path)
    if current != path:
      self.moved[path] = current
    return current

  def find(self, selector: str, where: str):
    """Returns the class or function that a selector names.

    Raises:
      UserError: it is not imported, does not exist, or is neither a class nor a function.
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
  """Returns the module of a path, also of an earlier version's."""
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
  """Returns the object of a dotted path: modules as far as they are imported, then attributes."""
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
  """A value from the parser, with the imports of its file, and its file and line."""

  value: Any
  names: Names
  where: str
  used: bool = False


def references(value) -> Iterator[Reference]:
  """Yields every reference in a value, at any depth."""
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
  """Returns a gin file by its path from the current folder, or else from the project's root.

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
  """Returns the name of a file for messages: its path from the project's root if it is in the project."""
  path = path.resolve()
  return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a gin file in UTF-8, without a byte order mark.

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
  # As Python reads text: lines that end as on Windows or on old Macs end like ours.
  return text.replace('\r\n', '\n').replace('\r', '\n')


def statements(text: str, source: str, one_line: bool = False) -> Iterator:
  """Yields the statements of a gin text, in order.

  Args:
    text: the text.
    source: its name in messages.
    one_line: it is a binding of the command line, which has no line number.

  Raises:
    UserError: it is not gin. The message has the line.
  """

  def place(line):
    return source if one_line or line is None else f'{source}:{line}'

  try:
    parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
    yield from parser
    # The parser stops without an error at some incomplete ends of a text.
    if parser.current_token.type != tokenize.ENDMARKER:
      raise UserError(f'{place(parser.current_token.start[0])}: this line is cut short.')
  except SyntaxError as error:  # also IndentationError
    # The first line of the message is Python's, about its syntax tree; the last one is the parser's own.
    why = (error.msg or 'not gin').splitlines()[-1].strip().rstrip('.')
    hint = ' (a string needs quotes)' if 'token' in why else ''
    raise UserError(f'{place(error.lineno)}: {why}{hint}.') from None
  except tokenize.TokenError as error:
    why, (line, _) = error.args
    raise UserError(f'{place(line)}: this is not gin syntax ({why}).') from None
  except (RecursionError, MemoryError):
    raise UserError(f'{source}: brackets are nested too deeply.') from None
  # A dict whose key is a list, or a number that Python does not accept.
  except (TypeError, ValueError) as error:
    raise UserError(
      f'{place(parser.current_token.start[0])}: this value cannot be read ({error}).'
    ) from None


def qualify(text: str, find) -> str:
  """Returns a binding of the command line in the form of a gin file: imports, and names with their module.

  Args:
    text: `name = value`.
    find: returns the class or function of a bare name.
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
  """Returns `value` with the selector of every reference outside strings replaced by `full(selector)`."""
  parts = re.split(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", value)
  reference = r'@((?:\w+/)*)(\w+(?:\.\w+)*)'

  def replace(match):
    return f'@{match[1]}{full(match[2])}'

  # Every second part is a string in quotes.
  parts[::2] = [re.sub(reference, replace, part) for part in parts[::2]]
  return ''.join(parts)
