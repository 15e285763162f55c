"""The parameters that a fit holds: which values are possible, and which of them another law can hold too."""

import math
from collections.abc import Mapping

import numpy as np

from research.scaling.laws.base import Law, LawError, Parameter
from research.scaling.laws.loss import Chinchilla, TiedChinchilla


def check(law: Law, fixed: Mapping | None, tied: Mapping | None = None, output=None) -> None:
  """Checks what is held before anything is fitted.

  Args:
    fixed: natural values of the parameters that do not move.
    tied: the parameters that equal another one, name -> name.
    output: the law's output in each row; None where it is not known yet.

  Raises:
    LawError: the law lacks a parameter, a value is impossible, or nothing is left to fit.
  """
  fixed = fixed or {}
  tied = tied or {}
  for name, value in fixed.items():
    if why := why_not(law, name, value, output):
      raise LawError(f'--fix={name}={_show(value)}: {why}')
    if name in tied:
      raise LawError(f'--fix={name}={_show(value)}: {name} is tied too; leave out --tie={name}.')
  for name, other in tied.items():
    for known in (name, other):
      if known not in law.parameters:
        raise LawError(f'--tie={name}={other}: {law.no_parameter(known)}')
    if other in tied:
      raise LawError(
        f'--tie={name}={other}: {other} is tied itself; tie {name} to one that is not.'
      )
  if len({*fixed, *tied}) == len(law.parameters):
    raise LawError(
      f'--fix leaves no parameter of {law.name} to fit; leave out one of {_names(fixed)}.'
    )


def why_not(law: Law, name: str, value: float, output=None) -> str | None:
  """Why `law` cannot hold a parameter at `value`, a sentence that says what to do; None where it can.

  Args:
    output: as in `check`.
  """
  if name not in law.parameters:
    return law.no_parameter(name)
  parameter = law.parameters[name]
  try:
    value = float(value)
  except (TypeError, ValueError):
    value = math.nan
  if not math.isfinite(value):
    return f'{name} must be a finite number.'
  if parameter.limits:
    inside = parameter.low <= value <= parameter.high
    return None if inside else f'{name} must be from {parameter.low:g} to {parameter.high:g}.'
  if _is_floor(name, parameter):
    return _floor_why_not(law, name, value, output)
  if parameter.positive and not value > 0:
    return f'{name} must be above 0.'
  if parameter.positive or parameter.low < 0:  # the second: of any sign
    return None
  if value < 0 or (value == 0 and _alone_in_a_term(law, name)):
    return f'{name} must be above 0, as an exponent of {law.name} is.'
  return None


def _floor_why_not(law: Law, name: str, value: float, output) -> str | None:
  if value < 0:
    return f'{name} must be 0 or more.'
  if output is None or not np.size(output):
    return None
  lowest = float(np.min(output))
  if value >= lowest:
    return (
      f'{name} must be below the smallest {law.output} of the rows, {lowest:.4g}; fix it lower.'
    )
  return None


def _is_floor(name: str, parameter: Parameter) -> bool:
  """Whether the parameter is what the output tends to from above. It may be 0."""
  return name == 'E' and parameter.positive and dict(parameter.units) == {'output': 1}


def _alone_in_a_term(law: Law, name: str) -> bool:
  """Whether a term of the law is a constant like E where this exponent is 0."""
  if 'E' not in law.parameters:
    return False
  for parameter in law.parameters.values():
    powers = {power.lstrip('-') for power in parameter.units.values() if isinstance(power, str)}
    if powers == {name}:
      return True
  return False


def in_place_of(law: Law, fixed: Mapping | None, tied: Mapping | None) -> tuple[dict, dict]:
  """What TiedChinchilla holds, (fixed, tied), where it comes in place of `law`.

  Chinchilla's parameters mean the same there; of other laws only E does. A tie of alpha and beta is true of it.

  Raises:
    LawError: TiedChinchilla cannot hold one of them.
  """
  other = TiedChinchilla()
  shared = set(other.parameters) if isinstance(law, Chinchilla) else {'E'}
  fixed = dict(fixed or {})
  tied = {k: v for k, v in (tied or {}).items() if {k, v} != {'alpha', 'beta'}}
  for name in (*fixed, *tied, *tied.values()):
    if name not in shared:
      flag = 'fix' if name in fixed else 'tie'
      raise LawError(
        f'{other.name} does not take its place, since it has no {name} of {law.name} to hold; '
        f'leave out --{flag}={name}, or add runs.'
      )
  if len({*fixed, *tied}) == len(other.parameters):
    raise LawError(
      f'{other.name} does not take its place, since --fix holds all of its parameters.'
    )
  return fixed, tied


def of_chinchilla(law: Law, fixed: Mapping | None) -> dict:
  """What is fixed in `law` as parameters of Chinchilla, without those that mean another thing there."""
  fixed = dict(fixed or {})
  if isinstance(law, TiedChinchilla) and 'alpha' in fixed:
    fixed['beta'] = fixed['alpha']
  same = isinstance(law, (Chinchilla, TiedChinchilla))
  return {name: value for name, value in fixed.items() if same or name == 'E'}


def unheard(fixed: Mapping | None) -> str | None:
  """A sentence where approach 2, which has no parameter but E, cannot hold what is fixed; else None."""
  names = [name for name in fixed or {} if name != 'E']
  if not names:
    return None
  return (
    f'approach 2 does not hold {_names(names)}, which only a law has: with --rule=law a forecast is by '
    'the law alone.'
  )


def _names(names) -> str:
  return ', '.join(names)


def _show(value) -> str:
  return f'{value:g}' if isinstance(value, (int, float)) else str(value)
