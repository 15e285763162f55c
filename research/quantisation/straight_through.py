"""Quantisation-aware training: matrices are rounded in the forward pass and learn as if they were not.

    models.LanguageModel.weight = @straight_through.StraightThrough
    straight_through.StraightThrough.format = 4

The parameters stay float32. `research.quantise` with the same format, group and offsets rounds them to the
numbers that the forward pass used.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.parameters import check_sizes, param, project
from research.model.weights import Matrix, Weight
from research.quantisation.formats import knob_format
from research.quantisation.quantised import Layout


class StraightThrough(Weight):
  """A matrix that is rounded whenever it is read; its gradient passes the rounding unchanged.

  The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): with w' = w + stop(round(w) - w), the
  gradient by w is that by w'.

  Knobs:
    format, group, offsets: as in `quantised.Quantised`.
    activations: the format of the inputs of projections, with one scale for each token; None leaves them as
      they are. The inputs of experts, heads and token tables are never rounded.
  """

  def __init__(
    self,
    matrix: Matrix,
    *,
    format: str | int = 'int8',
    group: int | None = None,
    offsets: bool = False,
    activations: str | int | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(matrix)
    check_sizes(type(self), group=group)
    self.form = knob_format(type(self), 'format', format, offsets)
    self.of_inputs = None
    if activations is not None:
      self.of_inputs = knob_format(type(self), 'activations', activations)
    self.offsets = offsets
    self.layout = Layout(matrix, group)
    self.base = param(
      rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind, active=matrix.active
    )

  def __getitem__(self, index) -> jax.Array:
    return self.whole()[index]

  def whole(self) -> jax.Array:
    """The rounded matrix, float32."""
    matrix = self.base[...]
    split, axes = self.layout.split(matrix)
    rounded = self.form.round_trip(jax.lax.stop_gradient(split), axes, self.offsets)
    return straight_through(matrix, rounded.reshape(matrix.shape))

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    if self.of_inputs is not None:
      over = tuple(range(x.ndim - self.inputs, x.ndim))
      plain = jax.lax.stop_gradient(x).astype(jnp.float32)
      x = straight_through(x, self.of_inputs.round_trip(plain, over).astype(x.dtype))
    return project(x, self.whole(), self.axes, to, contract=self.inputs)


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """`rounded`, with the gradient of x."""
  return x + jax.lax.stop_gradient(rounded - x)
