"""Reads config.json, and makes sure that no key goes unread.

`Settings` knows what an absent key means to the family, checks the types of the values, and remembers which
keys were asked for. A key that is left over must have no effect on the function that the model computes. Any
other is refused by name: an option that nothing reads would silently give another model.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError, did_you_mean
from research.core.storage import LFS_POINTER
from research.core.text import one_line
from research.huggingface.defaults import ALIASES, DEFAULTS
from research.huggingface.harmless import HARMLESS, RELEASED, WITHOUT_EFFECT, is_harmless, wanted


def read_json(path: pathlib.Path) -> dict:
  """Returns the object in a JSON file.

  Raises:
    UserError: the file is empty or cut, is not UTF-8, begins with a byte order mark, or holds no object.
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
  """Turns the object that transformers writes for an infinity into a number; leaves others as they are."""
  return float(value['__float__']) if value.keys() == {'__float__'} else value


class Settings:
  """The keys of a config.json, and the family's defaults for those that are absent."""

  def __init__(
    self,
    given: dict[str, Any],
    model_type: str,
    *,
    defaults: dict[str, Any] | None = None,
    inside: str = '',
    tensors: tuple[str, ...] = (),
    same_tensors: Callable[[str, str], bool] | None = None,
  ):
    """
    Args:
      given: the keys and values in the file.
      model_type: the family.
      defaults: the meaning of absent keys; None takes the family's.
      inside: the key whose value these settings are, for messages.
      tensors: the names of the tensors in the checkpoint.
      same_tensors: whether the tensors of two names are equal; None where no files are at hand.
    """
    self.model_type = model_type
    self.inside = inside
    self.defaults = DEFAULTS.get(model_type, {}) if defaults is None else defaults
    self.given = given if inside else self._without_aliases(given)
    self.tensors = frozenset(tensors)
    self.same_tensors = same_tensors or _never_the_same
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
    """The name of a key in messages, on one line whatever text the file has for it."""
    return one_line(f'{self.inside}.{key}' if self.inside else key)

  def is_given(self, key: str) -> bool:
    """Whether the file has the key, null included."""
    return key in self.given

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key, None where it is null, and the family's default where it is absent.

    Raises:
      UserError: the value is not of the type of the default.
    """
    self.read.add(key)
    family_default = self.defaults.get(key)
    if key not in self.given:
      return default if _has_no_value(family_default) else family_default
    value = self.given[key]
    kind = family_default if isinstance(family_default, type) else type(family_default)
    if family_default is None or value is None:
      return value
    if not _has_type(value, kind, family_default):
      raise UserError(
        f'config.json: {self.name(key)} = {value!r} of {self.model_type} is not of the type {kind.__name__}.'
      )
    return int(value) if kind is int and isinstance(value, float) else value

  def get_or_refuse_null(self, key: str) -> Any:
    """As `get`, but refuses a null where the family's default is a value and not null."""
    return self.get(key) if _has_no_value(self.defaults.get(key)) else self[key]

  def __getitem__(self, key: str) -> Any:
    value = self.get(key)
    if value is None:
      why = 'is null' if self.is_given(key) else 'is missing'
      raise UserError(f'config.json: {self.name(key)} {why}, and {self.model_type} needs it.')
    return value

  def child(self, key: str, value: dict, defaults: dict[str, Any] | None = None) -> 'Settings':
    """Returns the settings in the object that is the value of a key."""
    if not isinstance(value, dict):
      raise UserError(f'config.json: {self.name(key)} = {value!r} is not an object.')
    child = Settings(value, self.model_type, defaults=defaults or {}, inside=self.name(key))
    self.children.append(child)
    return child

  def check_all_read(self) -> None:
    """Refuses the keys that were not asked for, except those without effect on the function.

    Raises:
      UserError: names the first such key and its value.
    """
    for key in sorted(self.given.keys() - self.read):
      value = self.given[key]
      if not self.inside and key in WITHOUT_EFFECT:
        if kind := wanted(self.model_type, key, value):
          raise UserError(
            f'config.json: {key} = {value!r} of {self.model_type} should be {kind}; correct it, or take it out.'
          )
        continue
      if is_harmless('' if self.inside else self.model_type, key, value):
        continue
      is_known = key in HARMLESS or key in RELEASED.get(self.model_type, {})
      why = '' if is_known else ': this project does not know what it does'
      hint = did_you_mean(key, {*self.read, *HARMLESS, *self.defaults} - {key})
      raise UserError(
        f'config.json: {self.name(key)} = {one_line(repr(value))} of {self.model_type} is not supported{why}. '
        f'Take it out if it has no effect.{hint if hint.startswith(" Did") else ""}'
      )
    for child in self.children:
      child.check_all_read()


def _never_the_same(name: str, other: str) -> bool:
  return False


def _has_no_value(default) -> bool:
  """Whether a default is null: None, or the type that the key has otherwise."""
  return default is None or isinstance(default, type)


def _has_type(value, kind: type, default) -> bool:
  """Whether a value of config.json is of the type of a default. 4.0 passes for an int, and 4 for a float."""
  if default == 'auto':  # a number, or the word
    return value == 'auto' or (isinstance(value, int) and not isinstance(value, bool))
  if kind in (int, float):
    if isinstance(value, bool) or not isinstance(value, int | float):
      return False
    return kind is float or float(value).is_integer()
  return isinstance(value, kind)
