"""Resolves the bindings of a configuration into values: every reference becomes a `functools.partial`."""

import ast
import contextlib
import dataclasses
import functools
from collections.abc import Callable

from research.core import signatures
from research.core.errors import UserError, did_you_mean, failure
from research.core.gin_reader import Binding, Macro, Reference


class Resolver:
  """Turns bindings into values. It tracks open macros and references, so that a circle is an error."""

  def __init__(self, bindings: dict[tuple, Binding], macros: dict[str, Binding], find: Callable):
    """
    Args:
      bindings: of a `Config`; those that are needed are marked as used.
      macros: of a `Config`; those that are needed are marked as used.
      find: returns the class or function of (selector, names, where).
    """
    self.bindings = bindings
    self.macros = macros
    self.find = find
    self.open_macros: list[str] = []
    self.open_references: list[tuple] = []

  def resolve(self, value, scope: str, binding: Binding, path: str):
    """Returns a value with its macros and references replaced.

    Args:
      value: from the parser.
      scope: the scope of the reference that this is an argument of.
      binding: the binding that has the value.
      path: from the root to this value, for messages.
    """
    match value:
      case Macro():
        return self._macro(value.name, scope, binding, path)
      case Reference():
        return self._reference(value, value.scope or scope, binding, path)
      case dict():
        result = {}
        for key, part in value.items():
          resolved = self.resolve(key, scope, binding, path)
          result[resolved] = self.resolve(part, scope, binding, f'{path}[{key!r}]')
        return result
      case list() | tuple():
        return type(value)(
          self.resolve(part, scope, binding, f'{path}[{i}]') for i, part in enumerate(value)
        )
      case _:
        return value

  def _macro(self, name, scope, binding, path):
    if name not in self.macros:
      raise UserError(f'{binding.where}: no macro %{name}.{did_you_mean(name, self.macros)}')
    if name in self.open_macros:
      circle = [*self.open_macros[self.open_macros.index(name) :], name]
      names = ' -> '.join(f'%{macro}' for macro in circle)
      raise UserError(f'{binding.where}: {names} is a circle; give one of them a value.')
    macro = self.macros[name]
    macro.used = True
    self.open_macros.append(name)
    value = self.resolve(macro.value, scope, macro, path)
    self.open_macros.pop()
    return value

  def _reference(self, reference, scope, binding, path):
    target = self.find(reference.selector, binding.names, binding.where)
    if (target, scope) in self.open_references:
      raise UserError(
        f'{binding.where}: {path} is a {_name(target)} inside of itself, without end.'
      )
    self.open_references.append((target, scope))
    # A circle through a reference is found by `open_references`; these macros start anew.
    outer, self.open_macros = self.open_macros, []
    arguments = {
      name: self._argument(target, name, bound, scope, f'{path}.{name}')
      for name, bound in self._bound(target, scope).items()
    }
    self.open_macros = outer
    self.open_references.pop()
    _check_required(target, arguments, f'{binding.where}: {path}')
    if not arguments and not reference.call:
      return target
    bound = functools.partial(target, **arguments)
    return call(bound, f'{binding.where}: {path}') if reference.call else bound

  def _bound(self, target, scope: str) -> dict[str, Binding]:
    """Returns the bindings of a class in a scope; those of an inner scope win."""
    arguments = {}
    parts = scope.split('/') if scope else []
    for count in range(len(parts) + 1):
      prefix = '/'.join(parts[:count])
      for (binding_scope, owner, name), binding in self.bindings.items():
        if binding_scope == prefix and owner is target:
          binding.used = True
          arguments[name] = binding
    return arguments

  def _argument(self, target, name, binding, scope, path):
    value = self.resolve(binding.value, scope, binding, path)
    hint = signatures.hints(target).get(name)
    parameter = signatures.parameters(target).get(name)
    default = parameter is not None and value is parameter.default
    if hint is None or default or signatures.allows(hint, value):
      return value
    where = place(binding, self.macros)
    raise UserError(f'{where}: {_name(target)}.{name}: {_mismatch(hint, value)}')


def _name(target) -> str:
  return getattr(target, '__name__', repr(target))


def _mismatch(hint, value) -> str:
  """Returns why an annotation does not allow a value."""
  wanted = getattr(hint, '__name__', str(hint)) if isinstance(hint, type) else str(hint)
  wanted = wanted.replace('NoneType', 'None')
  if isinstance(value, str):
    with contextlib.suppress(ValueError, SyntaxError):
      if signatures.allows(hint, ast.literal_eval(value)):
        return f'{value!r} is a string; write {value} without quotes.'
  return f'{value!r} is of type {type(value).__name__}, and {wanted} is wanted.'


def _check_required(target, arguments, place: str) -> None:
  # By convention what a parent passes is positional (or rngs); keyword-only arguments are the knobs.
  dataclass = dataclasses.is_dataclass(target)
  for name, parameter in signatures.parameters(target).items():
    named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    required = named and parameter.default is parameter.empty
    knob = dataclass or parameter.kind is parameter.KEYWORD_ONLY
    if required and knob and name != 'rngs' and name not in arguments:
      raise UserError(
        f'{place} needs {_name(target)}.{name}; set it in a gin file or with '
        f'--gin.{_name(target)}.{name}=...'
      )


def call(partial, place: str):
  """Calls a partial of a gin file. An error of its code becomes a `UserError` that starts with `place`."""
  try:
    return partial()
  except UserError:
    raise
  except Exception as error:
    name = _name(getattr(partial, 'func', partial))
    raise UserError(f'{place}: {name} cannot be made: {failure(error)}.') from error


def place(binding: Binding, macros: dict[str, Binding]) -> str:
  """Returns the file and line of a value, and those of the macro that has it, for messages."""
  if isinstance(binding.value, Macro) and binding.value.name in macros:
    return f'{macros[binding.value.name].where}, by %{binding.value.name} at {binding.where}'
  return binding.where
