"""Turns dataclasses into JSON and back: the spec of a stream.

The spec names the stream's frozen files, and tells the freezing process what to make.

A spec names a class of this project by its bare name. It names a class from outside as 'module:Class', so
that the freezing process imports the same module as the gin file.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
import sys

from research.core.errors import UserError

# Where bare names are looked up. Module names and not modules, because these modules import this one.
_MODULES = tuple(
  f'research.data.{name}'
  for name in ('streams', 'objectives', 'corpora', 'vocabularies', 'cleaning')
)


def digest(value) -> str:
  """Returns a hash of a JSON value: 16 hexadecimal digits."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def class_name(kind: type) -> str:
  """Returns the name of a class in a spec.

  Raises:
    UserError: the class is in a script, a notebook or a function, so no other process can import it.
  """
  if kind.__module__ in _MODULES:
    return kind.__name__
  if kind.__module__ == '__main__' or '<locals>' in kind.__qualname__:
    raise UserError(
      f'{kind.__name__} is defined in a script, a notebook or a function, and the process that freezes '
      'cannot import it: move it to the top of a module of its own.'
    )
  return f'{kind.__module__}:{kind.__qualname__}'


def find_class(name: str) -> type:
  """Returns the class with this name in a spec; imports its module.

  Raises:
    UserError: the module cannot be imported or has no such class.
  """
  module_name, _, qualified = name.rpartition(':')
  if module_name:
    try:
      value = importlib.import_module(module_name)
      for part in qualified.split('.'):
        value = getattr(value, part)
      return value
    except (ImportError, AttributeError) as e:
      raise UserError(
        f'the freezing process cannot import {qualified} of {module_name}: {e}'
      ) from e
  for module_name in _MODULES:
    module = importlib.import_module(module_name)
    if hasattr(module, name):
      return getattr(module, name)
  raise UserError(f'a stream spec names the class {name!r}, which this version does not have.')


def to_spec(value):
  """Turns a value of dataclasses, containers and scalars into JSON values."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: to_spec(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {'class': class_name(type(value)), **fields}
  if isinstance(value, list | tuple):
    return [to_spec(v) for v in value]
  if isinstance(value, dict):
    return {str(k): to_spec(v) for k, v in value.items()}
  if isinstance(value, pathlib.Path):
    return str(value)
  return value


def from_spec(spec):
  """Undoes `to_spec`. Lists become tuples."""
  if isinstance(spec, dict) and 'class' in spec:
    fields = {k: from_spec(v) for k, v in spec.items() if k != 'class'}
    return find_class(spec['class'])(**fields)
  if isinstance(spec, list):
    return tuple(from_spec(v) for v in spec)
  if isinstance(spec, dict):
    return {k: from_spec(v) for k, v in spec.items()}
  return spec


def outside_code(spec) -> dict[str, str]:
  """Returns {module: digest of its source} for the classes in a spec that come from outside the project.

  Their code decides the frozen text as their fields do, so it is part of a stream's key.
  """
  if isinstance(spec, list):
    parts = spec
  elif isinstance(spec, dict):
    parts = [v for v in spec.values() if isinstance(v, list | dict)]
  else:
    return {}
  code = {}
  for part in parts:
    code |= outside_code(part)
  name = spec.get('class', '') if isinstance(spec, dict) else ''
  if ':' in name:
    module = name.rpartition(':')[0]
    source = getattr(sys.modules.get(module), '__file__', None)
    content = pathlib.Path(source).read_bytes() if source else b''
    code[module] = hashlib.sha256(content).hexdigest()[:16]
  return code
