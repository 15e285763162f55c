"""Attention with projected relative positions, as in Transformer-XL, Gopher and Chinchilla."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.model.attention import Attention, recalled, visible
from research.model.kernels.dot_product import dot_product_attention
from research.model.layers import Linear
from research.model.parameters import normal, param
from research.model.part import Context, Cost, Factory
from research.model.positions import by_place
from research.model.weights import Matrix, make_weight
from research.parallel.axes import shard, spec


class RelativeAttention(Attention):
  """Multi-head attention whose logits also depend on a projection of the distance (Dai et al. 2019).

  logits[i, j] = scale ((q_i + u) k_j + (q_i + v) W r_{i-j}), where r are the sinusoids of the distance and u, v
  are learned for each head (arXiv:1901.02860, section 3.3). W is [embed, heads, head_dim]. There is no memory
  between segments, unlike in the paper.

  Knobs:
    window: as in `Attention`.
    weight: makes W (see `weights`); None takes the model's choice.
  """

  def __init__(
    self,
    embed: int,
    *,
    heads: int,
    head_dim: int,
    window: int | None = None,
    linear: Factory = Linear,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(embed, heads=heads, head_dim=head_dim, window=window, linear=linear, rngs=rngs)
    shape = (heads, head_dim)
    init = functools.partial(normal, stddev=embed**-0.5)
    position = Matrix((embed, *shape), ('embed', 'heads', 'head_dim'), init)
    self.position = make_weight(position, weight, rngs=rngs)
    make_bias = functools.partial(
      param, rngs, shape, ('heads', 'head_dim'), nnx.initializers.zeros, kind='vector'
    )
    self.content_bias = make_bias()
    self.position_bias = make_bias()

  def __call__(self, x: jax.Array, context: Context):
    q, k, v = self.project(x, x, context)
    k, v, context = context.recall(k, v, window=self.window)
    # If the mesh splits lengths, every device compares its queries with all keys.
    k, v = (shard(y, 'batch', None, 'kv_heads', None) for y in (k, v))
    content_bias, position_bias = (
      shard(y[...].astype(x.dtype), 'heads', None) for y in (self.content_bias, self.position_bias)
    )
    if context.key_positions is not None:
      mask, bias = recalled(context, self.window)
      by_distance = self.at_distances(q + position_bias, context)
      bias = by_distance if bias is None else by_distance + bias
      q = q + content_bias
      return self.output(dot_product_attention(q, k, v, mask=mask, bias=bias, scale=self.scale)), {}
    bias = self.by_distance(q + position_bias)
    if context.bias is not None:
      bias = bias + by_place(context.bias, x.shape[1])[None]
    segments = context.segments
    lengths = (x.shape[1], x.shape[1])
    mask = visible(
      segments, segments, lengths, causal=context.causal, prefix=context.prefix, window=self.window
    )
    q = q + content_bias
    return self.output(dot_product_attention(q, k, v, mask=mask, bias=bias, scale=self.scale)), {}

  def at_distances(self, q: jax.Array, context: Context) -> jax.Array:
    """As `by_distance`, in decoding: few queries [batch, length, heads, head_dim], and the cached keys."""
    kernel = shard(self.position[...].astype(q.dtype), None, 'heads', None)
    r = sinusoids(np.arange(context.state.room), kernel.shape[0]).astype(q.dtype)
    q = jnp.einsum('bqhd,ehd->bqhe', q * self.scale, kernel)
    logits = jnp.einsum('bqhe,ne->bhqn', q, r, preferred_element_type=jnp.float32)
    distance = context.positions[:, :, None] - context.key_positions[:, None, :]
    return jnp.take_along_axis(logits, jnp.clip(distance, 0, r.shape[0] - 1)[:, None], axis=3)

  def by_distance(self, q: jax.Array) -> jax.Array:
    """Returns scale q_i W r_{i-j}, [batch, heads, query, key], of q [batch, length, heads, head_dim]."""
    batch, length, heads, _ = q.shape
    q = shard(q, 'batch', None, 'heads', None)  # the reshapes below move entries between rows
    kernel = shard(self.position[...].astype(q.dtype), None, 'heads', None)
    r = sinusoids(np.arange(length - 1, -length, -1), kernel.shape[0]).astype(q.dtype)
    r = jnp.einsum('ne,ehd->nhd', r, kernel)
    logits = jnp.einsum('bqhd,nhd->bhqn', q * self.scale, r, preferred_element_type=jnp.float32)

    def reshape(x, *shape):
      return x.reshape(shape, out_sharding=spec('batch', 'heads', None, None, shape=shape))

    # Row i has the distances length - 1 down to 1 - length, and needs i down to i + 1 - length. The trick is
    # the paper's: pad a column, read the rows as one entry shorter, and each row starts one entry further on.
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 0), (1, 0)))
    logits = reshape(logits, batch, heads, 2 * length, length)[:, :, 1:]
    logits = reshape(logits, batch, heads, length, 2 * length - 1)[..., :length]
    return shard(logits, 'batch', 'heads', 'length', None)

  def cost(self, length: int, encoder_length: int) -> Cost:
    """That of `Attention`, and half as many FLOPs again for the products with distances."""
    cost = super().cost(length, encoder_length)
    return dataclasses.replace(cost, full=cost.full * 3 // 2, visible=cost.visible * 3 // 2)


def sinusoids(positions: np.ndarray, embed: int) -> jax.Array:
  """Returns sines, then cosines, of positions [n], [n, embed]; the wavelengths are 2 pi to 20000 pi."""
  frequency = 10_000.0 ** (-np.arange(0, embed, 2) / embed)
  angle = positions[:, None] * frequency
  return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1), jnp.float32)
