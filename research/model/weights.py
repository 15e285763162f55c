"""Makes the matrices of a model, all in one place, so that one line of gin changes them all.

Every projection, expert, head and token table makes its matrix by `make_weight`. By default that is a plain
float32 parameter. `models.LanguageModel.weight = @some_module.SomeWeight` (or `EncoderDecoder.weight`) replaces
all of them: by matrices with a low-rank addition, by quantised or by pruned ones. The knob `weight` of a single
class takes precedence over the model's, so `heads.UntiedHead.weight = @weights.plain` leaves the head as it is.

Routers, convolutions, norms and biases are plain parameters and stay so.
"""

import contextlib
import contextvars
import dataclasses
import math

import jax
from flax import nnx

from research.model.parameters import Initializer, Kind, look_up, param, project
from research.model.part import Factory

# The factory of the model that is being built. A context variable, since parts are built by their parents, in a
# stack under `jax.vmap`, without a reference to the model.
_of_the_model: contextvars.ContextVar[Factory | None] = contextvars.ContextVar(
  'weight', default=None
)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """The specification of a matrix, or of several of one shape.

  Attributes:
    shape: [stacked axes..., input axes..., output axes...].
    axes: the names of the axes, for sharding.
    init: the initializer.
    inputs: how many axes are contracted with the input.
    stacked: how many leading axes count independent matrices (1 for experts).
    kind: 'matrix', or 'table' if rows are looked up (then the rows count as the inputs).
    active: the fraction that one token uses (below 1 for experts).
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Initializer
  inputs: int = 1
  stacked: int = 0
  kind: Kind = 'matrix'
  active: float = 1.0

  @property
  def fan_in(self) -> int:
    """The product of the input axes."""
    return math.prod(self.shape[self.stacked : self.stacked + self.inputs])


def plain(matrix: Matrix, *, rngs: nnx.Rngs) -> nnx.Param:
  """Makes a plain float32 parameter, the default."""
  return param(rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind, active=matrix.active)


class Weight(nnx.Module):
  """A matrix that is computed from parameters.

  A subclass makes its parameters in `__init__(matrix, *, knobs, rngs)` and defines `__getitem__`. That is
  enough. If the product is cheaper without the whole matrix (low rank) or in another arithmetic (int8), it
  overrides `multiply`; if single rows are cheaper, `rows`. Experts, heads and normalised matrices read the
  whole matrix.

  Convention: the parameter in place of a plain parameter `name` is `name.base`, so that checkpoints map by
  rule.
  """

  def __init__(self, matrix: Matrix):
    self.shape = matrix.shape
    self.axes = matrix.axes
    self.inputs = matrix.inputs
    self.stacked = matrix.stacked

  def __getitem__(self, index) -> jax.Array:
    """Returns the matrix, in its whole shape, by `weight[...]`, as for a parameter."""
    raise NotImplementedError(f'{type(self).__name__} needs __getitem__, which returns its matrix.')

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    """Returns x [..., inputs] times the matrix; `to` names the axes of the result."""
    return project(x, self[...], self.axes, to, contract=self.inputs)

  def rows(self, index: jax.Array, dtype) -> jax.Array:
    """Returns rows of a table, [batch, length, embed], for index [batch, length]."""
    return look_up(self[...].astype(dtype), self.axes[0], index)


def make_weight(matrix: Matrix, chosen: Factory | None, *, rngs: nnx.Rngs) -> nnx.Param | Weight:
  """Makes a matrix by the caller's factory (`chosen`), or else the model's, or else as a plain parameter."""
  factory = chosen or _of_the_model.get() or plain
  return factory(matrix, rngs=rngs)


@contextlib.contextmanager
def used_by_default(factory: Factory | None):
  """Makes `factory` the default of `make_weight` within the block (None changes nothing)."""
  token = _of_the_model.set(factory or _of_the_model.get())
  try:
    yield
  finally:
    _of_the_model.reset(token)


def multiply(x: jax.Array, weight, axes: tuple, to: tuple, contract: int) -> jax.Array:
  """Returns x times a matrix from `make_weight`; arguments as for `parameters.project`."""
  if isinstance(weight, Weight):
    return weight.multiply(x, to)
  return project(x, weight[...], axes, to, contract=contract)


def rows(weight, axis: str | None, index: jax.Array, dtype) -> jax.Array:
  """Returns rows of a table from `make_weight`; arguments as for `parameters.look_up`."""
  if isinstance(weight, Weight):
    return weight.rows(index, dtype)
  return look_up(weight[...].astype(dtype), axis, index)
