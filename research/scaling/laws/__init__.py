"""Every law, by name."""

from research.errors import did_you_mean
from research.scaling.laws.base import Law, LawError, Parameter, coefficient, exponent
from research.scaling.laws.loss import Chinchilla, GammaChinchilla, TiedChinchilla, hoffmann_starts

__all__ = [
  'Chinchilla',
  'GammaChinchilla',
  'Law',
  'LawError',
  'Parameter',
  'TiedChinchilla',
  'by_name',
  'coefficient',
  'exponent',
  'hoffmann_starts',
  'standard',
]


def standard() -> list[Law]:
  """An instance of every law here that needs no arguments."""
  kinds = (value for value in globals().values() if isinstance(value, type))
  return [kind() for kind in kinds if issubclass(kind, Law) and kind is not Law]


def by_name(name: str) -> Law:
  """The law of that name; a LawError suggests the nearest."""
  known = {law.name: law for law in standard()}
  if name not in known:
    raise LawError(f'There is no law {name!r}.{did_you_mean(name, known)}')
  return known[name]
