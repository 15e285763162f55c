"""Every law, by name."""

from research.scaling.laws.base import Law, LawError, Parameter, coefficient, exponent
from research.scaling.laws.loss import Chinchilla, GammaChinchilla, TiedChinchilla, hoffmann_starts

__all__ = [
  'Chinchilla',
  'GammaChinchilla',
  'Law',
  'LawError',
  'Parameter',
  'TiedChinchilla',
  'coefficient',
  'exponent',
  'hoffmann_starts',
]
