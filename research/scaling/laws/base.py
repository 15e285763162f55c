"""The base of a law: a formula, parameters with their units, and where a fit starts.

A parameter's units are powers of the inputs and of the fitted quantity (called 'output'). The fit divides them
out, so that its numbers are near one in any unit, be tokens counted in ones or in billions. A change of units
changes the fitted parameters exactly as dimensional analysis says.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np

from research.core.errors import UserError, did_you_mean


@contextlib.contextmanager
def precise():
  """A context with float64 on the host's CPU, since accelerators are slow at float64. JAX's settings stay."""
  try:
    device = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS has no CPU
    device = None
  with jax.enable_x64(True), jax.numpy_rank_promotion('allow'), jax.default_device(device):
    yield


# In place of ln 0. Minus infinity would make the gradient of exp(exponent * ln x) NaN; exp(-1e6 * exponent) is
# 0 in float64 for every exponent above 1e-3.
LN_ZERO = -1e6


class LawError(UserError, ValueError):
  """A law cannot be used like this, such as with a parameter or an input that it does not have."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One fitted number.

  Attributes:
    meaning: for the table of parameters.
    units: powers of the inputs, and of the output under the name 'output'. A power is a number, or the name of
      another parameter, perhaps with a minus sign. A in A / N^alpha has the units output * N^alpha, written
      {'output': 1, 'params': 'alpha'}.
    start: values to start from, in these units at the geometric mean of the data, so that they need no scale.
    positive: whether the fit is of its logarithm.
    low, high: bounds, of the logarithm where `positive`.
    linear: whether the law is linear in it (with the other parameters fixed), which variable projection uses.
    limits: whether the bounds are part of the law, as a share is at most 1, so that a fit may end there. Other
      bounds are guards, and a fit that ends there is refused.
  """

  meaning: str
  units: Mapping[str, float | str] = dataclasses.field(default_factory=dict, hash=False)
  start: tuple[float, ...] = (1.0,)
  positive: bool = True
  low: float = -14.0
  high: float = 14.0
  linear: bool = False
  limits: bool = False

  def coordinates(self) -> list[float]:
    """`start` in the dimensionless coordinates of a fit: logarithms where `positive`."""
    return [math.log(value) if self.positive else value for value in self.start]


def share(meaning, start) -> Parameter:
  """A number between 0 and 1, both included, such as an accuracy."""
  return Parameter(meaning, start=start, positive=False, low=0.0, high=1.0, limits=True)


def coefficient(meaning, start=(0.03, 0.3, 1.0), **units) -> Parameter:
  """A positive factor in which the law is linear, in units of the loss times `units`."""
  return Parameter(meaning, {'output': 1, **units}, start, linear=True)


def exponent(meaning, start=(0.15, 0.35, 0.7), low=0.0, high=4.0) -> Parameter:
  """A power. Its bounds keep a fit from wandering along a direction in which nothing changes."""
  return Parameter(meaning, start=start, positive=False, low=low, high=high)


# One program: JAX's operations one by one compile each for every shape.
@functools.partial(jax.jit, static_argnames='law')
def _evaluate(law: 'Law', parameters: dict, inputs: dict):
  return law.predict(types.SimpleNamespace(**parameters), types.SimpleNamespace(**inputs))


def _by_value_or_identity(value):
  try:
    hash(value)
  except TypeError:
    return id(value)
  return value


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
  """A law. A subclass declares `form`, `source`, `inputs`, its Parameters and `predict`; see docs/laws.md.

  JAX traces `predict(p, x)`. `p.NAME` are natural parameter values, `x.NAME` the inputs and `x.ln_NAME` their
  logarithms, taken once outside the fit: write exp(-p.alpha * x.ln_params) for N^-alpha. Two instances of a law
  are equal if their fields are, so that they share a compiled fit.
  """

  source: ClassVar[str]
  form: ClassVar[str]
  output: ClassVar[str] = 'loss'
  inputs: ClassVar[tuple[str, ...]]
  # Inputs that are labels or may have any sign: they have no logarithm and no units. An output that may be zero
  # or negative (an accuracy, a reward) is listed too; it has a unit.
  plain: ClassVar[tuple[str, ...]] = ()
  # Inputs that may be zero; `x.ln_NAME` is LN_ZERO there, whose exponential is zero for any exponent.
  zeros: ClassVar[tuple[str, ...]] = ()
  # The default loss and residuals of a fit (see `law_fit.fit`). The errors of an accuracy do not grow with it,
  # so that its residuals are linear.
  robust: ClassVar[str] = 'huber'
  residuals: ClassVar[str] = 'log'
  parameters: ClassVar[Mapping[str, Parameter]]

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    declared = {name: value for name, value in vars(cls).items() if isinstance(value, Parameter)}
    cls.parameters = {**getattr(cls, 'parameters', {}), **declared}

  def _identity(self) -> tuple:
    """The class and its fields. A field without a hash, such as a list of arrays, equals only itself.

    JAX takes a law for a constant: two laws that were equal by mistake would share a compiled fit.
    """
    values = [getattr(self, field.name) for field in dataclasses.fields(self)]
    return (type(self), *map(_by_value_or_identity, values))

  def __eq__(self, other) -> bool:
    return isinstance(other, Law) and self._identity() == other._identity()

  def __hash__(self) -> int:
    return hash(self._identity())

  def predict(self, p, x):
    """The output at parameters `p` and inputs `x`, which broadcast."""
    raise NotImplementedError

  @property
  def name(self) -> str:
    """The name of the class, by which flags and files name the law."""
    return type(self).__name__

  def __call__(self, parameters: Mapping[str, float], **inputs) -> np.ndarray:
    """The law in float64; `parameters` and `inputs` broadcast against each other."""
    self.check_names(parameters)
    p = types.SimpleNamespace(**{k: np.asarray(v, np.float64) for k, v in parameters.items()})
    with precise():
      return np.array(_evaluate(self, vars(p), vars(self.namespace(inputs))))

  def namespace(self, inputs: Mapping) -> types.SimpleNamespace:
    """The `x` of `predict`: the inputs and their logarithms. Raises LawError for a missing input."""
    self._check_missing(inputs)
    x = {name: np.asarray(inputs[name], np.float64) for name in self.inputs}
    return types.SimpleNamespace(**x, **self.logarithms(x))

  def logarithms(self, x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`ln_NAME` of every input that has one."""
    logs = {}
    for name, values in x.items():
      if name in self.zeros:
        positive = np.where(values > 0, values, 1.0)
        logs[f'ln_{name}'] = np.where(values > 0, np.log(positive), LN_ZERO)
      elif name not in self.plain:
        logs[f'ln_{name}'] = np.log(values)
    return logs

  def _check_missing(self, inputs: Mapping) -> None:
    missing = [name for name in self.inputs if name not in inputs]
    if missing:
      raise LawError(f'{self.name} needs {", ".join(self.inputs)}: missing {", ".join(missing)}.')

  def check_point(self, point: Mapping[str, float]) -> None:
    """Raises LawError where `point` has other inputs than the law, or one that the law has no value at."""
    takes = ', '.join(self.inputs)
    for name in point:
      if name not in self.inputs:
        raise LawError(f'{self.name} is a law of {takes}, and not of {name!r}.')
    self._check_missing(point)
    for name, value in point.items():
      if not math.isfinite(value):
        raise LawError(f'{name} = {value} is no finite number.')
      zero_is_fine = name in self.zeros or name in self.plain
      if (name not in self.plain and value < 0) or (value == 0 and not zero_is_fine):
        least = 'zero or more' if zero_is_fine else 'positive'
        raise LawError(f'{name} = {value:g} must be {least}.')

  def check_names(self, parameters) -> None:
    """Raises LawError for a name that is not one of the law's parameters."""
    for name in parameters:
      if name not in self.parameters:
        raise LawError(self.no_parameter(name))

  def no_parameter(self, name: str) -> str:
    """The sentence about a name that is not one of the law's parameters."""
    return f'{self.name} has no parameter {name!r}.{did_you_mean(name, self.parameters)}'

  def natural(self, z: Mapping, center: Mapping[str, float], exp, fixed=(), tied=()) -> dict:
    """Natural values of all parameters at dimensionless coordinates `z` of the free ones.

    Args:
      center: ln of the geometric mean of each input and of the output.
      exp: `jnp.exp` or `np.exp`, by the arrays of `z`.
      fixed: natural values of some parameters.
      tied: for some parameters the name of the one that they equal.
    """
    fixed = dict(fixed)
    tied = dict(tied)
    values = {}
    for name, parameter in self._in_order(tied):
      if name in fixed:
        values[name] = fixed[name]
      elif name in tied:
        values[name] = values[tied[name]]
      else:
        shift = self._shift(parameter, values, center)
        values[name] = exp(z[name] + shift) if parameter.positive else z[name] * exp(shift)
    return {name: values[name] for name in self.parameters}

  def coordinates(self, values: Mapping[str, float], center: Mapping[str, float]) -> dict:
    """The inverse of `natural`, in numpy, for values of all parameters."""
    z = {}
    for name, parameter in self.parameters.items():
      shift = self._shift(parameter, values, center)
      if parameter.positive:
        with np.errstate(divide='ignore'):  # a value of 0 is at minus infinity
          z[name] = np.log(values[name]) - shift
      else:
        z[name] = values[name] * np.exp(-shift)
    return z

  def _in_order(self, tied):
    """(name, Parameter) with exponents first, since the units of coefficients refer to them.

    Among each of the two, tied parameters come after those that they equal.
    """

    def rank(item):
      name, parameter = item
      refers_to_another = any(isinstance(power, str) for power in parameter.units.values())
      return refers_to_another, name in tied

    return sorted(self.parameters.items(), key=rank)

  @staticmethod
  def _shift(parameter: Parameter, values: Mapping, center: Mapping[str, float]):
    """ln of a parameter's unit at the center of the data."""
    shift = 0.0
    for unit, power in parameter.units.items():
      if isinstance(power, str):
        power = -values[power[1:]] if power.startswith('-') else values[power]
      shift = shift + center[unit] * power
    return shift

  def starts(self) -> dict[str, np.ndarray]:
    """The product of the starts of all parameters, in dimensionless coordinates, [starts] each."""
    coordinates = [parameter.coordinates() for parameter in self.parameters.values()]
    grid = np.array(list(itertools.product(*coordinates)))
    return dict(zip(self.parameters, grid.T, strict=True))
