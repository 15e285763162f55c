"""The arguments of classes and functions, and which values their annotations allow."""

import collections.abc
import functools
import inspect
import types
import typing


# The plan of a sweep reads some hundred configurations, and each asks this of the same classes.
@functools.cache
def parameters(target) -> dict[str, inspect.Parameter]:
  """Returns the arguments of a class or a function, without `self`; none if Python does not know them."""
  # The signature of an NNX class itself is (*args, **kwargs).
  function = target.__init__ if inspect.isclass(target) else target
  try:
    arguments = dict(inspect.signature(function).parameters)
  except (TypeError, ValueError):  # some builtins
    return {}
  arguments.pop('self', None)
  return arguments


@functools.cache
def hints(target) -> dict[str, typing.Any]:
  """Returns the annotation of each argument; {} if they cannot be evaluated."""
  try:
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
  except (AttributeError, NameError, TypeError, ValueError):
    return {}


def allows(hint, value) -> bool:
  """Returns whether an annotation allows a plain value: a string, number, bool, None, or tuple or list of
  these.

  An annotation that this function does not understand allows everything, since annotations are not written for
  it.
  """
  if not _plain(value) or hint is inspect.Parameter.empty:
    return True
  origin = typing.get_origin(hint)
  arguments = typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(allows(argument, value) for argument in arguments)
  if origin is typing.Literal:
    return value in arguments
  if origin in (tuple, list, collections.abc.Sequence):
    if not isinstance(value, tuple | list):
      return False
    one_kind = origin is not tuple or arguments[1:] == (...,)
    kinds = arguments[:1] * len(value) if one_kind else arguments
    return all(allows(kind, part) for kind, part in zip(kinds, value, strict=False))
  if origin is collections.abc.Callable or hint is collections.abc.Callable:
    return False
  if hint is None:
    return value is None
  if not isinstance(hint, type) or origin is not None:
    return True
  if hint is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, hint) or hint in (object, type) or hint not in _PLAIN


_PLAIN = (str, int, float, bool, type(None), tuple, list, dict)


def _plain(value) -> bool:
  if isinstance(value, tuple | list):
    return all(map(_plain, value))
  return value is None or isinstance(value, str | int | float | bool)
