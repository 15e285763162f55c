"""The text of a resolved configuration: every value that the run uses, defaults too."""

import dataclasses
import functools
import inspect

from research.core.signatures import parameters


def _has_parts(value) -> bool:
  return any(map(_has_parts, value)) if isinstance(value, list | tuple) else callable(value)


def describe(value, indent: int = 0) -> str:
  """Returns a resolved tree as text, with defaults."""
  pad = '  ' * indent
  if dataclasses.is_dataclass(value) and not inspect.isclass(value):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    # A checkpoint is described by its content and not by its folder.
    fields = value.described() if hasattr(value, 'described') else fields
    name = type(value).__name__
  elif callable(value):
    target, arguments = value, {}
    if isinstance(value, functools.partial):
      target, arguments = value.func, value.keywords
    defaults = {n: p.default for n, p in parameters(target).items() if p.default is not p.empty}
    name = f'{target.__module__}.{target.__qualname__}'
    fields = {**defaults, **arguments} if arguments or inspect.isclass(value) else {}
  elif isinstance(value, list | tuple) and any(map(_has_parts, value)):
    return '[\n' + ''.join(f'{pad}  {describe(v, indent + 1)}\n' for v in value) + f'{pad}]'
  else:
    return repr(value)
  lines = ''.join(f'\n{pad}  {k} = {describe(v, indent + 1)}' for k, v in fields.items())
  return name + lines
