"""The matrices of a model: made in one place, so that one line of gin changes what they all are.

Every projection, expert, head and token table makes its matrix by `make_weight`. By default that is a plain
float32 parameter. `models.LanguageModel.weight = @some_module.SomeWeight` (or `EncoderDecoder.weight`) puts
something else in all those places: a matrix with a low-rank addition, a quantised one, a pruned one. A class's
own knob of this name comes before the model's, so `heads.UntiedHead.weight = @weights.plain` leaves the head
as it is.

Routers, convolutions, norms and biases are parameters by themselves and stay as they are.
"""

import contextlib
import contextvars
import dataclasses
import math

import jax
from flax import nnx

from research.model.parameters import Initializer, Kind, look_up, param, project
from research.model.part import Factory

# The factory of the model that is being built now; parts inside `jax.vmap` (a stack's layers) see it too.
_of_the_model: contextvars.ContextVar[Factory | None] = contextvars.ContextVar(
  'weight', default=None
)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """What a caller wants: a matrix, or several of one shape.

  Attributes:
    shape: [stacked axes..., input axes..., output axes...].
    axes: their names, for sharding.
    init: makes the numbers.
    inputs: how many axes are contracted with the input.
    stacked: how many leading axes number independent matrices (1 for experts).
    kind: 'matrix', or 'table' where rows are looked up (then the rows count as the inputs).
    active: the fraction that one token visits (of experts).
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
  """A float32 parameter, which is what a matrix is by default."""
  return param(rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind, active=matrix.active)


class Weight(nnx.Module):
  """A matrix that is not a parameter itself but is made of some.

  A subclass makes its parameters in `__init__(matrix, *, knobs, rngs)` and defines `__getitem__`, which is
  enough. Where the product is cheaper without the whole matrix (low rank) or in another arithmetic (int8), it
  overrides `multiply`; where rows are cheaper alone, `rows`. Experts, heads and normalised matrices read the
  whole.

  Convention: what stands for the plain parameter `name` is `name.base`, so that checkpoints map by rule.
  """

  def __init__(self, matrix: Matrix):
    self.shape, self.axes = matrix.shape, matrix.axes
    self.inputs, self.stacked = matrix.inputs, matrix.stacked

  def __getitem__(self, index) -> jax.Array:
    """The whole matrix, of this shape: `weight[...]`, as of a parameter."""
    raise NotImplementedError(f'{type(self).__name__} needs __getitem__, which gives its matrix.')

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    """x [..., inputs] times the matrix; `to` names the axes of the result."""
    return project(x, self[...], self.axes, to, contract=self.inputs)

  def rows(self, index: jax.Array, dtype) -> jax.Array:
    """Rows [batch, length, embed] of a table."""
    return look_up(self[...].astype(dtype), self.axes[0], index)


def make_weight(matrix: Matrix, chosen: Factory | None, *, rngs: nnx.Rngs) -> nnx.Param | Weight:
  """The matrix, by the caller's own factory, or the model's, or plain."""
  factory = chosen or _of_the_model.get() or plain
  return factory(matrix, rngs=rngs)


@contextlib.contextmanager
def used_by_default(factory: Factory | None):
  """Within this, matrices whose maker names no factory are made by this one (None changes nothing)."""
  token = _of_the_model.set(factory or _of_the_model.get())
  try:
    yield
  finally:
    _of_the_model.reset(token)


def multiply(x: jax.Array, weight, axes: tuple, to: tuple, contract: int) -> jax.Array:
  """x times a matrix that `make_weight` made; arguments as of `parameters.project`."""
  if isinstance(weight, Weight):
    return weight.multiply(x, to)
  return project(x, weight[...], axes, to, contract=contract)


def rows(weight, axis: str | None, index: jax.Array, dtype) -> jax.Array:
  """Rows of a table that `make_weight` made; arguments as of `parameters.look_up`."""
  if isinstance(weight, Weight):
    return weight.rows(index, dtype)
  return look_up(weight[...].astype(dtype), axis, index)
