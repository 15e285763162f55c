"""config.json: read from its file, and looked up so that no key goes unread.

`Settings` knows what an absent key means to the family, checks the type of what is there, and remembers which
keys somebody asked for. What is left over either has no effect on the function that the model computes, or is
refused by name: an option that nobody read would silently make another model.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError, did_you_mean
from research.core.storage import LFS_POINTER
from research.core.text import one_line
from research.huggingface.defaults import ALIASES, DEFAULTS
from research.huggingface.harmless import HARMLESS, WITHOUT_EFFECT, wanted


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file.

  Raises:
    UserError: the file is not UTF-8, begins with a byte order mark, was cut, or holds something else.
  """
  data = path.read_bytes()
  if not data.strip():
    raise UserError(f'{path} is empty; download it again.')
  if data.startswith(LFS_POINTER):
    raise UserError(
      f'{path} is a Git LFS pointer and not the file itself; fetch it with git lfs pull.'
    )
  if data.startswith((b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')):
    raise UserError(f'{path} begins with a byte order mark; save it as UTF-8 without one.')
  try:
    value = json.loads(data.decode(), object_hook=_number)
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 (at byte {error.start}); save it as UTF-8.') from None
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}. It may have been cut; '
      'download it again.'
    ) from None
  except (RecursionError, ValueError, TypeError):
    raise UserError(f'{path} is not a configuration: its values cannot be read.') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} holds a {type(value).__name__} where a JSON object is wanted.')
  return value


def _number(value: dict) -> Any:
  """An infinity, which transformers writes as an object."""
  return float(value['__float__']) if value.keys() == {'__float__'} else value


class Settings:
  """The keys of a config.json, with the defaults of a family under them."""

  def __init__(
    self,
    given: dict[str, Any],
    model_type: str,
    *,
    defaults: dict[str, Any] | None = None,
    inside: str = '',
    tensors: tuple[str, ...] = (),
    same_tensors: Callable[[str, str], bool] = lambda a, b: False,
  ):
    """
    Args:
      given: what the file says.
      model_type: the family.
      defaults: what absent keys mean; None takes the family's.
      inside: the key that these settings are the value of, for messages.
      tensors: the names of the tensors in the checkpoint.
      same_tensors: whether the tensors of two names are equal.
    """
    self.model_type, self.inside = model_type, inside
    self.defaults = DEFAULTS.get(model_type, {}) if defaults is None else defaults
    self.given = given if inside else self._without_aliases(given)
    self.tensors, self.same_tensors = frozenset(tensors), same_tensors
    self.read = {'model_type'}
    self.children: list[Settings] = []

  def _without_aliases(self, given):
    aliases = ALIASES.get(self.model_type, {})
    values = {key: value for key, value in given.items() if key not in aliases}
    for alias, key in aliases.items():
      if alias in given and values.setdefault(key, given[alias]) != given[alias]:
        raise UserError(
          f'config.json: {alias} = {given[alias]!r} and {key} = {values[key]!r} are two names of one key; '
          'leave one of them out.'
        )
    return values

  def name(self, key: str) -> str:
    """How a message calls a key, which may be any text of a file."""
    return one_line(f'{self.inside}.{key}' if self.inside else key)

  def is_given(self, key: str) -> bool:
    """Whether the file has the key at all."""
    return key in self.given

  def get(self, key: str, default: Any = None) -> Any:
    """The value of a key, None where it is null, and what the family takes for one that is absent.

    Raises:
      UserError: the value is not of the type of the default.
    """
    self.read.add(key)
    known = self.defaults.get(key)
    kind = known if isinstance(known, type) else type(known) if known is not None else None
    if key not in self.given:
      return default if known is None or isinstance(known, type) else known
    value = self.given[key]
    if value is not None and kind is not None and not _is_of(value, kind, known):
      raise UserError(
        f'config.json: {self.name(key)} = {value!r} of {self.model_type} is not of the type {kind.__name__}.'
      )
    return int(value) if kind is int and isinstance(value, float) else value

  def get_or_refuse_null(self, key: str) -> Any:
    """As `get`, but a null is refused where the family's default is a value and not null."""
    known = self.defaults.get(key)
    return self.get(key) if known is None or isinstance(known, type) else self[key]

  def __getitem__(self, key: str) -> Any:
    value = self.get(key)
    if value is None:
      why = 'is null' if self.is_given(key) else 'is missing'
      raise UserError(f'config.json: {self.name(key)} {why}, and {self.model_type} needs it.')
    return value

  def child(self, key: str, value: dict, defaults: dict[str, Any] | None = None) -> 'Settings':
    """The settings in the object that is the value of a key."""
    if not isinstance(value, dict):
      raise UserError(f'config.json: {self.name(key)} = {value!r} is not an object.')
    child = Settings(value, self.model_type, defaults=defaults or {}, inside=self.name(key))
    self.children.append(child)
    return child

  def check_all_read(self) -> None:
    """Refuses the keys that nobody asked for, but those that have no effect.

    Raises:
      UserError: the first such key, with its value.
    """
    for key in sorted(self.given.keys() - self.read):
      value = self.given[key]
      allowed = HARMLESS.get(key, (None,))
      harmless = any(is_same(value, option) for option in allowed)
      if not self.inside and key in WITHOUT_EFFECT:
        if kind := wanted(self.model_type, key, value):
          raise UserError(
            f'config.json: {key} = {value!r} of {self.model_type} should be {kind}; correct it, or take it out.'
          )
        continue
      if harmless:
        continue
      known = {*self.read, *HARMLESS, *self.defaults} - {key}
      hint = did_you_mean(key, known)
      raise UserError(
        f'config.json: {self.name(key)} = {one_line(repr(value))} of {self.model_type} is not supported'
        f'{": this project does not know what it does" if key not in HARMLESS else ""}. '
        f'Take it out if it has no effect.{hint if hint.startswith(" Did") else ""}'
      )
    for child in self.children:
      child.check_all_read()


def _is_of(value, kind: type, known) -> bool:
  if known == 'auto':  # a number, or the word
    return value == 'auto' or (isinstance(value, int) and not isinstance(value, bool))
  if kind in (int, float):
    if isinstance(value, bool) or not isinstance(value, int | float):
      return False
    return kind is float or float(value).is_integer()
  return isinstance(value, kind)


def is_same(a, b) -> bool:
  """Equality that tells True from 1."""
  return a == b and isinstance(a, bool) == isinstance(b, bool)
