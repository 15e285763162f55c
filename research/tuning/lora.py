"""Small matrices that learn beside a base that stays as it is: LoRA, rsLoRA, DoRA and (IA)^3.

    models.LanguageModel.weight = @lora.LoRA
    run.Run.learns = ('.*/lora_[ab]',)

replaces every matrix: projections, experts, heads and token tables. A binding of one class, such as
`embedder.Embedder.weight = @weights.plain`, leaves its matrices out. While `lora_b` is zero, the model equals
the base bit by bit. `merge.merged` turns such matrices into plain ones.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid
from research.model.parameters import check_sizes, normal, param, project
from research.model.part import Factory
from research.model.weights import Matrix, Weight, multiply, plain


class LoRA(Weight):
  """W + scale A B, A drawn and B zero (Hu et al. 2021, arXiv:2106.09685, section 4.1).

  W is [inputs, outputs], A is [inputs, rank] and B is [rank, outputs]. Every expert has its own A and B.

  Knobs:
    rank: the rank of A B.
    alpha: the scale is alpha / rank.
    rank_stabilized: the scale is alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
    base: makes W: a plain matrix or any other weight, such as a quantised one.
  """

  def __init__(
    self,
    matrix: Matrix,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    base: Factory = plain,
    rngs: nnx.Rngs,
  ):
    super().__init__(matrix)
    check_sizes(type(self), rank=rank)
    if not alpha > 0:
      raise Invalid(type(self), 'alpha', f'{alpha!r} must be positive.')
    self.alpha = alpha
    self.rank_stabilized = rank_stabilized
    self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
    self.base = base(matrix, rngs=rngs)
    start = matrix.stacked
    end = start + matrix.inputs
    # A table yields one row of A, and not a sum over all rows, so its rows do not count as inputs.
    fan_in = rank if matrix.kind == 'table' else matrix.fan_in
    self.lora_a = param(
      rngs,
      (*matrix.shape[:end], rank),
      (*matrix.axes[:end], None),
      functools.partial(normal, stddev=fan_in**-0.5),
      kind=matrix.kind,
      active=matrix.active,
    )
    self.lora_b = param(
      rngs,
      (*matrix.shape[:start], rank, *matrix.shape[end:]),
      (*matrix.axes[:start], None, *matrix.axes[end:]),
      nnx.initializers.zeros,
      kind='matrix',
      active=matrix.active,
    )

  @property
  def rank(self) -> int:
    """The width of A and the height of B."""
    return self.lora_a.shape[-1]

  def __getitem__(self, index) -> jax.Array:
    return self.whole()[index]

  def whole(self) -> jax.Array:
    """W + scale A B."""
    stack = tuple(range(self.stacked))
    contracted = (self.lora_a.ndim - 1,), (self.stacked,)
    product = jax.lax.dot_general(self.lora_a[...], self.lora_b[...], (contracted, (stack, stack)))
    return self.base[...] + self.scale * product

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    """x W + scale (x A) B, which never makes A B."""
    y = multiply(x, self.base, self.axes, to, self.inputs)
    lead = to[: x.ndim - self.inputs]
    axes = self.axes[: self.inputs]
    low = project(x, self.lora_a[...], (*axes, None), (*lead, None), contract=self.inputs)
    return y + self.scale * project(low, self.lora_b[...], (None, *self.axes[self.inputs :]), to)


class DoRA(LoRA):
  """(W + scale A B) with a learned length of every column (Liu et al. 2024, arXiv:2402.09353, equation 5).

  `magnitude` is the ratio of that length to the column's length in W, so that it starts at 1 whichever W is
  loaded. The knobs are LoRA's.
  """

  def __init__(self, matrix: Matrix, *, rngs: nnx.Rngs, **knobs):
    super().__init__(matrix, rngs=rngs, **knobs)
    start = self.stacked
    end = start + self.inputs
    shape = (*matrix.shape[:start], *matrix.shape[end:])
    axes = (*matrix.axes[:start], *matrix.axes[end:])
    ones = nnx.initializers.ones
    self.magnitude = param(rngs, shape, axes, ones, kind='vector', active=matrix.active)

  def whole(self) -> jax.Array:
    base = self.base[...]
    changed = super().whole()
    over = tuple(range(self.stacked, self.stacked + self.inputs))
    # The length of the changed column counts as a constant (section 4.3): less memory, the same result.
    ratio = _length(base, over) / jax.lax.stop_gradient(_length(changed, over))
    return changed * (jnp.expand_dims(self.magnitude[...], over) * ratio)

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    return Weight.multiply(self, x, to)


def _length(matrix: jax.Array, over: tuple[int, ...]) -> jax.Array:
  """The Euclidean length over some axes, which are kept with size 1."""
  return jnp.sqrt(jnp.sum(matrix * matrix, axis=over, keepdims=True))


class Rescaled(Weight):
  """A matrix whose inputs or outputs are multiplied by a learned vector, which starts at one.

  Knobs:
    of_inputs: whether the inputs are multiplied, and not the outputs.
    base: makes the matrix.
  """

  def __init__(self, matrix: Matrix, *, of_inputs: bool, base: Factory = plain, rngs: nnx.Rngs):
    super().__init__(matrix)
    self.of_inputs = of_inputs
    self.base = base(matrix, rngs=rngs)
    start = self.stacked
    end = start + self.inputs
    kept = range(start, end) if of_inputs else range(end, len(matrix.shape))
    kept = [*range(start), *kept]
    self.scale = param(
      rngs,
      tuple(matrix.shape[i] for i in kept),
      tuple(matrix.axes[i] for i in kept),
      nnx.initializers.ones,
      kind='vector',
      active=matrix.active,
    )

  def __getitem__(self, index) -> jax.Array:
    start = self.stacked
    end = start + self.inputs
    others = range(end, len(self.shape)) if self.of_inputs else range(start, end)
    return (self.base[...] * jnp.expand_dims(self.scale[...], tuple(others)))[index]


def ia3(matrix: Matrix, *, base: Factory = plain, rngs: nnx.Rngs) -> nnx.Param | Weight:
  """(IA)^3 rescales keys, values and the MLP's hidden units (Liu et al. 2022, arXiv:2205.05638, 3.3).

  The other matrices stay as `base` makes them: `models.LanguageModel.weight = @lora.ia3`.
  """
  inputs = matrix.axes[matrix.stacked : matrix.stacked + matrix.inputs]
  outputs = matrix.axes[matrix.stacked + matrix.inputs :]
  if matrix.kind == 'matrix' and 'kv_heads' in outputs:
    return Rescaled(matrix, of_inputs=False, base=base, rngs=rngs)
  if matrix.kind == 'matrix' and inputs == ('mlp',):
    return Rescaled(matrix, of_inputs=True, base=base, rngs=rngs)
  return base(matrix, rngs=rngs)
