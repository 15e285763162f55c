"""The text of a resolved configuration: every value that will be used, defaults too."""

import dataclasses
import functools
import inspect

from research.core.signatures import parameters


def _has_parts(value) -> bool:
  return any(map(_has_parts, value)) if isinstance(value, list | tuple) else callable(value)


def describe(value, indent: int = 0) -> str:
  """The resolved tree as text, defaults included."""
  pad = '  ' * indent
  if dataclasses.is_dataclass(value) and not inspect.isclass(value):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    # A checkpoint is what it holds, and not the folder where it lies.
    fields = value.described() if hasattr(value, 'described') else fields
    name = type(value).__name__
  elif callable(value):
    target, given = (
      (value.func, value.keywords) if isinstance(value, functools.partial) else (value, {})
    )
    defaults = {n: p.default for n, p in parameters(target).items() if p.default is not p.empty}
    name = f'{target.__module__}.{target.__qualname__}'
    fields = {**defaults, **given} if given or inspect.isclass(value) else {}
  elif isinstance(value, list | tuple) and any(map(_has_parts, value)):
    return '[\n' + ''.join(f'{pad}  {describe(v, indent + 1)}\n' for v in value) + f'{pad}]'
  else:
    return repr(value)
  lines = ''.join(f'\n{pad}  {k} = {describe(v, indent + 1)}' for k, v in fields.items())
  return name + lines
