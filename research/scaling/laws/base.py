"""What a law is: a formula, parameters that carry their units, and where a fit should start.

A parameter's units are powers of the inputs and of the fitted quantity (called 'output').
The fit divides them out, so that it sees numbers near one whoever counted tokens in billions:
a change of units changes the fitted parameters exactly as dimensional analysis says.
"""

import contextlib
import dataclasses
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
  """float64 on the host's CPU, and nothing of it left behind: accelerators are poor at float64."""
  try:
    device = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    device = None
  with jax.enable_x64(True), jax.numpy_rank_promotion('allow'), jax.default_device(device):
    yield


# Stands for ln 0: minus infinity would make the gradient of exp(exponent * ln x) NaN, and exp(-1e6 * exponent)
# is 0 in float64 from an exponent of 1e-3 on.
LN_ZERO = -1e6


class LawError(UserError, ValueError):
  """A law that cannot be used as asked: a parameter or an input that it does not have."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One fitted number.

  `units`: powers of the inputs, and of the output under the name 'output'; a power is a number or the
  name of another parameter, with a minus sign or without. A in A / N^alpha has the units output * N^alpha:
  {'output': 1, 'params': 'alpha'}.
  `start`: values to start from, in those units at the data's geometric mean, so that they need no scale.
  `positive`: fitted through its logarithm. `low`, `high`: bounds; of the logarithm where positive.
  `linear`: the law is linear in it (at fixed other parameters), which variable projection uses.
  `limits`: the bounds are the law's own and not a guard: a share is at most 1. A fit may end at them.
  """

  meaning: str
  units: Mapping[str, float | str] = dataclasses.field(default_factory=dict, hash=False)
  start: tuple[float, ...] = (1.0,)
  positive: bool = True
  low: float = -14.0
  high: float = 14.0
  linear: bool = False
  limits: bool = False


def share(meaning, start) -> Parameter:
  """A number between 0 and 1, both included, such as an accuracy."""
  return Parameter(meaning, start=start, positive=False, low=0.0, high=1.0, limits=True)


def coefficient(meaning, start=(0.03, 0.3, 1.0), **units) -> Parameter:
  """A positive factor in which the law is linear, in units of the loss times `units`."""
  return Parameter(meaning, {'output': 1, **units}, start, linear=True)


def exponent(meaning, start=(0.15, 0.35, 0.7), low=0.0, high=4.0) -> Parameter:
  """A power; its bounds keep a fit from wandering along a direction in which nothing changes."""
  return Parameter(meaning, start=start, positive=False, low=low, high=high)


@dataclasses.dataclass(frozen=True)
class Law:
  """Subclass it with `inputs`, a Parameter each and `predict`; docs/laws.md adds one in fifteen lines.

  `predict(p, x)` is traced by jax. `p.NAME` are natural parameter values; `x.NAME` are the inputs and
  `x.ln_NAME` their logarithms, taken once outside the fit: write exp(-p.alpha * x.ln_params).
  Two instances of one law are equal, so that they share a compiled fit.
  """

  source: ClassVar[str]
  form: ClassVar[str]
  output: ClassVar[str] = 'loss'
  inputs: ClassVar[tuple[str, ...]]
  # Inputs that are labels or may have any sign: no logarithm is taken of them, and they have no units.
  # An output that may be zero or negative (an accuracy, a reward) stands here too; it keeps its unit.
  plain: ClassVar[tuple[str, ...]] = ()
  # Inputs that may be zero; `x.ln_NAME` is LN_ZERO there, whose exponential is zero for any exponent.
  zeros: ClassVar[tuple[str, ...]] = ()
  # How a fit measures misses unless it is told otherwise (see `law_fit.fit`). An accuracy has errors of
  # its own size everywhere, so that its residuals are no logarithms.
  robust: ClassVar[str] = 'huber'
  residuals: ClassVar[str] = 'log'
  parameters: ClassVar[Mapping[str, Parameter]]

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    declared = {name: value for name, value in vars(cls).items() if isinstance(value, Parameter)}
    cls.parameters = {**getattr(cls, 'parameters', {}), **declared}

  def predict(self, p, x):
    raise NotImplementedError

  @property
  def name(self) -> str:
    return type(self).__name__

  def __call__(self, parameters: Mapping[str, float], **inputs) -> np.ndarray:
    """The law in float64; `parameters` and `inputs` broadcast against each other."""
    self.check_names(parameters)
    p = types.SimpleNamespace(**{k: np.asarray(v, np.float64) for k, v in parameters.items()})
    with precise():
      return np.array(self.predict(p, self.namespace(inputs)))

  def namespace(self, inputs: Mapping) -> types.SimpleNamespace:
    missing = [name for name in self.inputs if name not in inputs]
    if missing:
      raise LawError(f'{self.name} needs {", ".join(self.inputs)}: missing {", ".join(missing)}.')
    x = {name: np.asarray(inputs[name], np.float64) for name in self.inputs}
    return types.SimpleNamespace(**x, **self.logarithms(x))

  def logarithms(self, x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`ln_NAME` of every input that has one."""
    logs = {}
    for name, values in x.items():
      if name in self.zeros:
        logs[f'ln_{name}'] = np.where(
          values > 0, np.log(np.where(values > 0, values, 1.0)), LN_ZERO
        )
      elif name not in self.plain:
        logs[f'ln_{name}'] = np.log(values)
    return logs

  def check_names(self, parameters) -> None:
    for name in parameters:
      if name not in self.parameters:
        raise LawError(
          f'{self.name} has no parameter {name!r}.{did_you_mean(name, self.parameters)}'
        )

  def natural(self, z: Mapping, center: Mapping[str, float], exp, fixed=(), tied=()) -> dict:
    """Dimensionless coordinates -> natural values; `center` holds ln geometric means.

    `fixed` maps names to natural values, `tied` names to the name whose value they share.
    """
    fixed, tied, values = dict(fixed), dict(tied), {}
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
    """The inverse of `natural`, in numpy, for a whole set of natural values."""
    z = {}
    for name, parameter in self.parameters.items():
      shift = self._shift(parameter, values, center)
      if parameter.positive:
        with np.errstate(divide='ignore'):
          z[name] = np.log(values[name]) - shift
      else:
        z[name] = values[name] * np.exp(-shift)
    return z

  def _in_order(self, tied):
    """Exponents first, since the units of coefficients refer to them; what is tied after what it is "
    "tied to."""
    named = lambda p: any(isinstance(power, str) for power in p.units.values())
    return sorted(self.parameters.items(), key=lambda item: (named(item[1]), item[0] in tied))

  @staticmethod
  def _shift(parameter: Parameter, values: Mapping, center: Mapping[str, float]):
    shift = 0.0
    for unit, power in parameter.units.items():
      if isinstance(power, str):
        power = -values[power[1:]] if power.startswith('-') else values[power]
      shift = shift + center[unit] * power
    return shift

  def starts(self) -> dict[str, np.ndarray]:
    """The product of every parameter's `start`, in dimensionless coordinates, [starts] each."""
    z0 = [
      [math.log(v) for v in p.start] if p.positive else list(p.start)
      for p in self.parameters.values()
    ]
    grid = np.array(list(itertools.product(*z0)))
    return dict(zip(self.parameters, grid.T, strict=True))
