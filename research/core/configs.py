"""gin in, partials out.

A gin file is read once, into a tree of `functools.partial`s that can be printed, compared, and written by hand
in a test; after that nothing consults gin again. The grammar is gin-config's own (its parser reads the files,
in the style of its dynamic registration: a file imports the modules whose classes it configures); the
bindings live in a `Config` and not in a global, so a misspelt name, a binding that nothing uses, a required
argument that nothing sets is an error with its file and line.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import pathlib
import re
import tokenize
from typing import Any

from gin import config_parser

from research.core.errors import Invalid, UserError, did_you_mean

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
COMMAND_LINE = 'command line'


@dataclasses.dataclass(frozen=True)
class _Reference:
  """`@scope/selector`, called when `call`."""

  scope: str
  selector: str
  call: bool


@dataclasses.dataclass(frozen=True)
class _Macro:
  name: str


class _Delegate(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    scope, _, selector = scoped_configurable_name.rpartition('/')
    return _Reference(scope, selector, evaluate)

  def macro(self, macro_name):
    return _Macro(macro_name)


@dataclasses.dataclass
class _Binding:
  value: Any
  symbols: dict  # what the names in `value` mean: the imports of the file it stands in
  where: str
  used: bool = False


def _parameters(target) -> dict[str, inspect.Parameter]:
  # The signature of an NNX class itself is (*args, **kwargs).
  function = target.__init__ if inspect.isclass(target) else target
  parameters = dict(inspect.signature(function).parameters)
  parameters.pop('self', None)
  return parameters


class Config:
  """The bindings of gin files and of the command line. `build()` makes the object they describe."""

  def __init__(self, root: str):
    self.root = root
    self.bindings: dict[tuple[str, Any, str], _Binding] = {}  # (scope, target, argument)
    self.macros: dict[str, _Binding] = {}
    self.symbols: dict[str, Any] = {}
    self.lines: list[str] = []

  @property
  def text(self) -> str:
    """One self-contained gin file that says the same."""
    return ''.join(self.lines)

  # Reading.

  def read_file(self, name: str, where: str | None = None) -> None:
    path = find_file(name, where)
    with path.open() as file:
      text = file.read()
    self._read(text, _shown(path))

  def read_binding(self, binding: str) -> None:
    """One `Class.argument=value` or `MACRO=value` of the command line."""
    where = f'--gin.{binding}'
    if not re.match(r'[\w./]+\s*=', binding):
      raise UserError(f'{where}: write it as --gin.Class.argument=value or --gin.MACRO=value.')
    self._read(binding + '\n', where)

  def _read(self, text: str, source: str) -> None:
    command_line = source.startswith('--gin.')
    symbols = dict(self.symbols) if command_line else {}
    at = lambda location: source if command_line else f'{source}:{location.line_num}'
    text_lines = text.splitlines(keepends=True)
    if text_lines and not text_lines[-1].endswith('\n'):
      text_lines[-1] += '\n'
    kept = 0
    try:
      for statement in config_parser.ConfigParser(io.StringIO(text), _Delegate()):
        where = at(statement.location) if hasattr(statement, 'location') else source
        match statement:
          case config_parser.ImportStatement():
            self._import(statement, symbols, where)
          case config_parser.IncludeStatement():
            line = statement.location.line_num
            self.lines += text_lines[kept : line - 1]
            kept = line
            self.read_file(statement.filename, where)
          case config_parser.BlockDeclaration():
            self._find(statement.selector, symbols, where)
          case config_parser.BindingStatement():
            self._bind(statement, symbols, where)
    except SyntaxError as error:
      line = error.lineno or '?'
      # The parser's first line is Python's own about its syntax tree; its last says what it could not read.
      why = error.msg.splitlines()[-1].strip().rstrip('.')
      hint = ' (a string needs quotes)' if 'token' in why else ''
      raise UserError(f'{source}{"" if command_line else f":{line}"}: {why}{hint}.') from None
    except (tokenize.TokenError, IndentationError) as error:
      raise UserError(f'{source}: not gin syntax ({error.args[0]}).') from None
    self.lines += [self._self_contained(text, source)] if command_line else text_lines[kept:]
    self.symbols.update(symbols)

  def _self_contained(self, text: str, where: str) -> str:
    """A command-line binding as a gin file would say it: bare names with their module, and its import."""
    modules = {}

    def full(selector):
      target = self._find(selector, self.symbols, where)
      modules[target.__module__] = None
      return f'{target.__module__}.{target.__qualname__}'

    name, _, value = text.partition('=')
    scope, _, selector = name.strip().rpartition('/')
    if '.' in selector:
      selector, _, argument = selector.rpartition('.')
      name = f'{scope}/{full(selector)}.{argument}'.lstrip('/')
    reference = r'@((?:\w+/)*)(\w+(?:\.\w+)*)'
    value = re.sub(reference, lambda match: f'@{match[1]}{full(match[2])}', value)
    return (
      ''.join(f'import {module}\n' for module in modules) + f'{name.strip()} = {value.strip()}\n'
    )

  def _import(self, statement, symbols, where):
    if statement.module.startswith('__gin__'):
      return
    try:
      module = importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
      if statement.module.startswith(error.name or ''):
        raise UserError(f'{where}: no Python module {statement.module!r} to import.') from None
      raise
    name = statement.bound_name()
    if statement.is_from or statement.alias:
      symbols[name] = module
    else:
      symbols[name] = importlib.import_module(name)

  def _bind(self, statement, symbols, where):
    binding = _Binding(statement.value, dict(symbols), where)
    if not statement.arg_name:
      self.macros[statement.selector] = binding
      return
    target = self._find(statement.selector, symbols, where)
    parameters = _parameters(target)
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if statement.arg_name not in parameters and not keywords:
      options = set(parameters) - {'rngs'}
      raise UserError(
        f'{where}: {target.__name__} has no argument {statement.arg_name!r}.'
        + did_you_mean(statement.arg_name, options)
      )
    self.bindings[statement.scope, target, statement.arg_name] = binding

  def _find(self, selector: str, symbols: dict, where: str):
    """The class or function that a selector names, by the imports of its file.

    On the command line a bare name is enough where it is the only one of that name bound so far.
    """
    first, *rest = selector.split('.')
    if where.startswith('--gin.') and first not in symbols:
      targets = {target for _, target, _ in self.bindings} | set(self._referenced())
      found = {target for target in targets if target.__name__ == selector}
      if len(found) == 1:
        return found.pop()
      names = {target.__name__ for target in targets} | set(self.macros)
      raise UserError(
        f'{where}: no configured class or function {selector!r}.{did_you_mean(selector, names)}'
      )
    if first not in symbols:
      raise UserError(
        f'{where}: {first!r} is not imported in this file (from a.b import {first}).'
        + did_you_mean(first, symbols)
      )
    target = symbols[first]
    for name in rest:
      if not hasattr(target, name):
        public = [n for n in vars(target) if not n.startswith('_')]
        near = did_you_mean(name, public) if did_you_mean(name, public).startswith(' Did') else ''
        raise UserError(f'{where}: {target.__name__} has no {name!r}.{near}')
      target = getattr(target, name)
    if not callable(target):
      raise UserError(f'{where}: {selector} is not a class or a function.')
    return target

  def _referenced(self):
    """Every class or function that some binding refers to."""

    def walk(value, binding):
      match value:
        case _Reference():
          yield self._find(value.selector, binding.symbols, binding.where)
        case dict():
          for v in value.values():
            yield from walk(v, binding)
        case list() | tuple():
          for v in value:
            yield from walk(v, binding)

    for binding in (*self.bindings.values(), *self.macros.values()):
      if not binding.where.startswith('--gin.'):  # whose own bare names are looked up here
        yield from walk(binding.value, binding)

  # Resolving.

  def tree(self):
    """The value of the root macro, every reference a `functools.partial` of what was bound to it."""
    if self.root not in self.macros:
      raise UserError(
        f'no {self.root} = @... in these gin files, so there is nothing to run.'
        + did_you_mean(self.root, self.macros)
      )
    with self.explains():
      tree = self._resolve(_Macro(self.root), '', _Binding(None, {}, ''), self.root)
    self._check_all_used()
    return tree

  def build(self):
    """The object itself: the root, called."""
    tree = self.tree()
    with self.explains():
      return tree()

  def _resolve(self, value, scope: str, binding: _Binding, path: str):
    match value:
      case _Macro(name):
        if name not in self.macros:
          raise UserError(f'{binding.where}: no macro %{name}.{did_you_mean(name, self.macros)}')
        macro = self.macros[name]
        macro.used = True
        return self._resolve(macro.value, scope, macro, path)
      case _Reference():
        return self._resolve_reference(value, value.scope or scope, binding, path)
      case dict():
        return {k: self._resolve(v, scope, binding, f'{path}[{k!r}]') for k, v in value.items()}
      case list() | tuple():
        return type(value)(
          self._resolve(v, scope, binding, f'{path}[{i}]') for i, v in enumerate(value)
        )
      case _:
        return value

  def _resolve_reference(self, reference, scope, binding, path):
    target = self._find(reference.selector, binding.symbols, binding.where)
    arguments = {}
    parts = scope.split('/') if scope else []
    for i in range(len(parts) + 1):
      prefix = '/'.join(parts[:i])
      for (s, t, name), bound in self.bindings.items():
        if s == prefix and t is target:
          bound.used = True
          arguments[name] = (bound, scope)
    arguments = {
      name: self._resolve(bound.value, s, bound, f'{path}.{name}')
      for name, (bound, s) in arguments.items()
    }
    # By convention what a parent passes is positional (or rngs); keyword-only arguments are the knobs.
    dataclass = dataclasses.is_dataclass(target)
    for name, p in _parameters(target).items():
      required = p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
      knob = dataclass or p.kind is p.KEYWORD_ONLY
      if required and knob and name != 'rngs' and name not in arguments:
        raise UserError(
          f'{binding.where}: {path} needs {target.__name__}.{name}; set it in a gin file or with '
          f'--gin.{target.__name__}.{name}=...'
        )
    bound = functools.partial(target, **arguments) if arguments or reference.call else target
    return bound() if reference.call else bound

  def _check_all_used(self):
    bindings = [(f'{s}/{t.__name__}.{n}'.lstrip('/'), b) for (s, t, n), b in self.bindings.items()]
    bindings += list(self.macros.items())
    used = [name for name, binding in bindings if binding.used]
    for name, binding in bindings:
      if binding.where.startswith('--gin.') and not binding.used:
        raise UserError(
          f'{binding.where}: nothing in this configuration uses {name}.{did_you_mean(name, used)}'
        )

  @contextlib.contextmanager
  def explains(self):
    """Within this an `Invalid` value becomes a `UserError` with the gin file and line that set it."""
    try:
      yield
    except Invalid as error:
      places = [
        b.where if not isinstance(b.value, _Macro) or b.value.name not in self.macros
        else f'{self.macros[b.value.name].where}, by %{b.value.name} at {b.where}'
        for (_, t, n), b in self.bindings.items()
        if t.__name__ == error.owner.__name__ and n == error.field
      ]  # fmt: skip
      where = places[-1] if places else 'default'
      raise UserError(f'{where}: {error}') from error


def find_file(name: str, where: str | None = None) -> pathlib.Path:
  """A gin file by its path from here or from the project's root."""
  for path in (pathlib.Path(name), ROOT / name):
    if path.is_file():
      return path
  known = [_shown(path) for path in sorted((ROOT / 'gin').rglob('*.gin'))]
  hint = did_you_mean(name, known)
  prefix = f'{where}: ' if where else ''
  raise UserError(f'{prefix}no gin file {name!r}.{hint if hint.startswith(" Did") else ""}')


def _shown(path: pathlib.Path) -> str:
  path = path.resolve()
  return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def load(files: str | list[str], bindings=(), root: str = 'RUN') -> Config:
  """Reads gin files in order, then command-line bindings over them."""
  config = Config(root)
  for file in [files] if isinstance(files, str) else files:
    config.read_file(file)
  for binding in bindings:
    config.read_binding(binding)
  return config
