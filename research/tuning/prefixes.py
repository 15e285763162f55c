"""Prefix tuning and prompt tuning: learned vectors steer a model that stays as it is."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid
from research.model.attention import recalled, visible
from research.model.kernels.dot_product import dot_product_attention
from research.model.kernels.split_sequence import is_split
from research.model.parameters import check_sizes, normal, param
from research.model.part import Context, Factory
from research.model.weights import Matrix, Weight, plain
from research.parallel.axes import shard, spec


class Prefix(nnx.Module):
  """Learned keys and values before all others, in each layer (Li & Liang 2021, arXiv:2101.00190, section 4).

  `attention.Attention.prefix = @prefixes.Prefix`. They have no position, and every packed document sees them.
  (In the paper an MLP computes them during training. Here they are parameters from the start, as the paper's
  are after training.)

  Knobs:
    length: the number of learned keys.
  """

  def __init__(self, kv_heads: int, head_dim: int, *, length: int, rngs: nnx.Rngs):
    check_sizes(Prefix, length=length)
    self.length = length
    shape = (length, kv_heads, head_dim)
    axes = (None, 'kv_heads', 'head_dim')
    self.key = param(rngs, shape, axes, normal, kind='table')
    self.value = param(rngs, shape, axes, normal, kind='table')

  def attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
  ) -> jax.Array:
    """As `attention.self_attention`, with the prefix before the keys and values; a window does not hide it.

    Raises:
      Invalid: the model has a position bias, or the mesh splits the length.
    """
    length = query.shape[1]
    if context.bias is not None:
      raise Invalid(Prefix, 'length', 'a prefix has no place in a position bias; use LoRA.')
    if is_split(length):
      raise Invalid(Prefix, 'length', 'a prefix needs whole sequences; set Mesh.context to 1.')
    if context.key_positions is not None:
      mask, _ = recalled(context, window)
    else:
      mask = visible(
        context.segments, context.segments, (length, length), causal=context.causal,
        prefix=context.prefix, window=window,
      )  # fmt: skip
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (self.length, 0)), constant_values=True)
    key = self._before(self.key, key)
    value = self._before(self.value, value)
    return dot_product_attention(query, key, value, mask=mask, scale=scale, soft_cap=soft_cap)

  def _before(self, learned: nnx.Param, x: jax.Array) -> jax.Array:
    """Learned vectors [length, kv_heads, head_dim], then x, along the length."""
    x = shard(x, 'batch', None, 'kv_heads', None)
    shape = (x.shape[0], *learned.shape)
    where = spec('batch', None, 'kv_heads', None, shape=shape)
    learned = shard(learned[...].astype(x.dtype), None, 'kv_heads', None)
    return jnp.concatenate([jnp.broadcast_to(learned, shape, out_sharding=where), x], axis=1)


class Prompt(Weight):
  """A table in which some rows learn: prompt tuning (Lester et al. 2021, arXiv:2104.08691), or new tokens.

  `embedder.Embedder.weight = @prefixes.Prompt`. The data begin with these tokens: a chat template writes the
  names of tokens that nothing else uses. The parameter is the difference from the rows of the table. It starts
  at zero, so the prompt starts from the vocabulary (section 3.2).

  Knobs:
    first: the first row that learns.
    length: the number of rows that learn.
    base: makes the table.
  """

  def __init__(
    self, matrix: Matrix, *, first: int, length: int, base: Factory = plain, rngs: nnx.Rngs
  ):
    super().__init__(matrix)
    check_sizes(Prompt, length=length)
    if matrix.kind != 'table':
      raise Invalid(Prompt, 'first', 'a prompt is of a table of tokens: bind Embedder.weight.')
    if first < 0 or first + length > matrix.shape[0]:
      why = f'rows {first} to {first + length - 1} are not all among the {matrix.shape[0]} tokens.'
      raise Invalid(Prompt, 'first', why)
    self.first = first
    self.base = base(matrix, rngs=rngs)
    shape = (length, *matrix.shape[1:])
    axes = (None, *matrix.axes[1:])
    self.prompt = param(rngs, shape, axes, nnx.initializers.zeros, kind='table')

  def __getitem__(self, index) -> jax.Array:
    after = self.shape[0] - self.first - self.prompt.shape[0]
    learned = jnp.pad(self.prompt[...], ((self.first, after), (0, 0)))
    return (self.base[...] + shard(learned, *self.axes))[index]
