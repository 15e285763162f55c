"""gin in, partials out.

A gin file is read once, into a tree of `functools.partial`s that can be printed, compared, and written by hand
in a test. After that no code reads gin's state. The bindings are in a `Config` and not in a global variable, so
a misspelt name, an unused binding and a missing argument are errors with file and line.
"""

import contextlib
import functools
import pathlib
import re
import sys

from gin.config_parser import BindingStatement, BlockDeclaration, ImportStatement, IncludeStatement

from research.core import gin_reader, moved, signatures
from research.core.errors import Invalid, UserError, did_you_mean
from research.core.gin_reader import ROOT, Binding, Macro, Names, find_file, shown
from research.core.resolver import Resolver, call, place
from research.core.text import one_line

__all__ = ['ROOT', 'Config', 'find_file', 'load']


class Config:
  """The bindings of gin files and of the command line. `build()` makes the object that they describe.

  Attributes:
    root: the macro that names this object.
    bindings: by scope, class or function, and argument.
    macros: by name.
  """

  def __init__(self, root: str):
    self.root = root
    self.bindings: dict[tuple, Binding] = {}
    self.macros: dict[str, Binding] = {}
    self._names = Names()
    self._lines: list[str] = []
    self._open_files: list[pathlib.Path] = []
    self._files_of_model: list[pathlib.Path] = []  # those that were open where MODEL was bound

  @property
  def text(self) -> str:
    """A single self-contained gin file with the same bindings."""
    return ''.join(self._lines)

  # Reading.

  def read_file(self, name: str, where: str | None = None) -> None:
    """Reads a gin file and its includes. Its bindings override those that were read before.

    Args:
      name: its path from the current folder, or from the project's root.
      where: the file and line that include it.
    """
    path = find_file(name, where)
    if path.resolve() in self._open_files:
      circle = self._open_files[self._open_files.index(path.resolve()) :]
      names = ' -> '.join(shown(file) for file in [*circle, path])
      raise UserError(f'{where}: this file includes itself ({names}); remove that include.')
    self._open_files.append(path.resolve())
    self._read(gin_reader.read_text(path), shown(path))
    self._open_files.pop()

  def read_binding(self, binding: str) -> None:
    """Reads a `Class.argument=value` or `MACRO=value` of the command line."""
    where = f'--gin.{one_line(binding)}'
    if not re.match(r'[\w./]+\s*=', binding):
      raise UserError(f'{where}: write it as --gin.Class.argument=value or --gin.MACRO=value.')
    if not binding.isprintable():
      raise UserError(f'{where}: a binding of the command line is one line; use a gin file.')
    statements = list(gin_reader.statements(binding + '\n', where, one_line=True))
    for statement in statements:
      if not isinstance(statement, BindingStatement):
        raise UserError(f'{where}: write it as --gin.Class.argument=value or --gin.MACRO=value.')
      self._bind(statement, self._names.copy(), where)
    self._lines.append(
      gin_reader.qualify(binding, lambda name: self._find(name, self._names, where))
    )

  def _read(self, content: str, source: str) -> None:
    names = Names()
    imports: dict[str, str] = {}  # the text of each name's import
    text_lines = content.splitlines(keepends=True)
    if text_lines and not text_lines[-1].endswith('\n'):
      text_lines[-1] += '\n'
    copied = 0  # lines of this file that are in the one text already
    for statement in gin_reader.statements(content, source):
      line = statement.location.line_num
      where = f'{source}:{line}'
      match statement:
        case ImportStatement():
          if not statement.module.startswith('__gin__'):
            names.add(statement, where)
            imports[statement.bound_name()] = statement.format() + '\n'
        case IncludeStatement():
          self._lines += text_lines[copied : line - 1]
          copied = line
          self.read_file(statement.filename, where)
          # In the one text, an include may have imported other modules under this file's names: import them
          # again.
          changed = [
            name for name, path in names.paths.items() if self._names.paths.get(name, path) != path
          ]
          self._lines += [imports[name] for name in changed]
        case BlockDeclaration():
          self._find(statement.selector, names, where)
        case BindingStatement():
          self._bind(statement, names, where)
    self._lines += text_lines[copied:]
    self._names.paths.update(names.paths)
    if names.moved:
      _tell_moved(source, len(names.moved), *next(iter(names.moved.items())))

  def _bind(self, statement, names: Names, where: str) -> None:
    binding = Binding(statement.value, names.copy(), where)
    for reference in gin_reader.references(statement.value):
      if reference.selector.partition('.')[0] in names.paths:
        names.path(reference.selector)  # records names of earlier versions
    if not statement.arg_name:
      if statement.selector == 'MODEL' and self._open_files:
        self._check_one_model(where)
      self.macros[statement.selector] = binding
      return
    target = self._find(statement.selector, names, where)
    parameters = signatures.parameters(target)
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if statement.arg_name not in parameters and not keywords:
      path = f'{target.__module__}.{target.__qualname__}.{statement.arg_name}'
      if path in moved.ARGUMENTS:
        name = f'{target.__name__}.{statement.arg_name}'
        raise UserError(f'{where}: there is no {name}; {moved.ARGUMENTS[path]}.')
      options = set(parameters) - {'rngs'}
      raise UserError(
        f'{where}: {target.__name__} has no argument {statement.arg_name!r}.'
        + did_you_mean(statement.arg_name, options)
      )
    self.bindings[statement.scope, target, statement.arg_name] = binding

  def _check_one_model(self, where: str) -> None:
    """Refuses the model of a second family: what the first bound would stay, such as its rotary positions."""
    file = self._open_files[-1]
    if self._files_of_model and file not in self._files_of_model:
      first = self.macros['MODEL'].where
      raise UserError(
        f'{where}: this is a second model beside that of {first}, whose bindings would stay; write a gin file '
        "with the lines of the run's, and include one model's file alone."
      )
    self._files_of_model = list(self._open_files)

  def _find(self, selector: str, names: Names, where: str):
    """Returns the class or function that a selector names, by the imports of its file.

    On the command line a bare name is enough if only one class or function of that name is bound so far.
    """
    if not where.startswith('--gin.') or selector.partition('.')[0] in names.paths:
      return names.find(selector, where)
    targets = {target for _, target, _ in self.bindings} | set(self._referenced())
    matching = {target for target in targets if target.__name__ == selector}
    if len(matching) == 1:
      return matching.pop()
    if matching:
      paths = ' and '.join(sorted(f'{target.__module__}.{selector}' for target in matching))
      raise UserError(
        f'{where}: {selector!r} may be {paths}; bind it in a gin file that imports one.'
      )
    known = {target.__name__ for target in targets} | set(self.macros)
    hint = did_you_mean(selector, known)
    raise UserError(f'{where}: no configured class or function {selector!r}.{hint}')

  def _referenced(self):
    """Yields every class or function that a binding of a file refers to."""
    for binding in (*self.bindings.values(), *self.macros.values()):
      if not binding.where.startswith('--gin.'):  # `_find` calls this for the bare names of those
        for reference in gin_reader.references(binding.value):
          yield self._find(reference.selector, binding.names, binding.where)

  # Resolving.

  def tree(self):
    """The value of the root macro, every reference a `functools.partial` of what was bound to it."""
    if self.root not in self.macros:
      raise UserError(
        f'no {self.root} = @... in these gin files, so there is nothing to run.'
        + did_you_mean(self.root, self.macros)
      )
    with self.explains():
      tree = Resolver(self.bindings, self.macros, self._find).resolve(
        Macro(self.root), '', Binding(None, Names(), ''), self.root
      )
    self._check_all_used()
    return tree

  def build(self):
    """The object itself: the root, called."""
    tree = self.tree()
    if not callable(tree):
      where = self.macros[self.root].where
      raise UserError(
        f'{where}: {self.root} = {tree!r} is not a class: write {self.root} = @module.Class.'
      )
    with self.explains():
      return call(tree, f'{self.macros[self.root].where}: {self.root}')

  def _check_all_used(self):
    bindings = [
      (f'{scope}/{target.__name__}.{argument}'.lstrip('/'), binding)
      for (scope, target, argument), binding in self.bindings.items()
    ]
    bindings += list(self.macros.items())
    used = [name for name, binding in bindings if binding.used]
    for name, binding in bindings:
      if binding.where.startswith('--gin.') and not binding.used:
        raise UserError(
          f'{binding.where}: nothing in this configuration uses {name}.{did_you_mean(name, used)}'
        )

  @contextlib.contextmanager
  def explains(self):
    """Turns an `Invalid` value within the block into a `UserError` with the gin file and line that set it."""
    try:
      yield
    except Invalid as error:
      places = [
        place(binding, self.macros)
        for (_, target, argument), binding in self.bindings.items()
        if target.__name__ == error.owner.__name__ and argument == error.field
      ]
      where = places[-1] if places else 'default'
      raise UserError(f'{where}: {error}') from error


@functools.cache  # once for each file, however often a sweep reads it
def _tell_moved(source: str, count: int, old: str, new: str) -> None:
  print(
    f'{source}: read {count} name{"s" if count > 1 else ""} of an earlier version as the present '
    f'{"ones" if count > 1 else "one"} ({old} is {new}; research/core/moved.py lists them all)',
    file=sys.stderr,
    flush=True,
  )


def load(files: str | list[str], bindings=(), root: str = 'RUN') -> Config:
  """Reads gin files in order, then command-line bindings over them."""
  config = Config(root)
  for file in [files] if isinstance(files, str) else files:
    config.read_file(file)
  for binding in bindings:
    config.read_binding(binding)
  return config
