"""FIXME: say what this module is."""

import dataclasses
import hashlib
import json
import pathlib


def digest(value) -> str:
  """16 hexadecimal digits that differ when the JSON-able `value` does."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def to_spec(value):
  """`value`, dataclasses and all, as JSON can hold it."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: to_spec(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {'class': type(value).__name__, **fields}
  if isinstance(value, list | tuple):
    return [to_spec(v) for v in value]
  if isinstance(value, dict):
    return {str(k): to_spec(v) for k, v in value.items()}
  if isinstance(value, pathlib.Path):
    return str(value)
  return value
