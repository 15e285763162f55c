"""Multi-head latent attention: keys and values are projections of one small vector per token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.attention import recalled, self_attention
from research.model.kernels.dot_product import dot_product_attention
from research.model.layers import Linear
from research.model.parameters import check_sizes
from research.model.part import Context, Cost, Factory
from research.model.positions import check_rotary
from research.parallel.axes import shard, spec


class LatentAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C).

  Keys and values are projections of one small latent vector per token. Only a part of a key is rotated, and all
  heads share that part. Decoding caches the latent vector and the rotated part.

  Knobs:
    heads: number of heads; queries and keys have head_dim + rotary_dim channels, values value_dim.
    key_rank, query_rank: widths of the latent vectors (query_rank None projects queries directly).
    norm: a norm of the latent vectors.
    rotary: as in `Attention`, for the rotary_dim channels.
    scale: factor of the logits; None is (head_dim + rotary_dim)^-1/2, which DeepSeek's YaRN multiplies.
  """

  def __init__(
    self,
    embed: int,
    *,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    value_dim: int,
    key_rank: int,
    query_rank: int | None = None,
    norm: Factory,
    rotary: Callable[..., jax.Array],
    scale: float | None = None,
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(
      LatentAttention, heads=heads, head_dim=head_dim, rotary_dim=rotary_dim, value_dim=value_dim,
      key_rank=key_rank, query_rank=query_rank,
    )  # fmt: skip
    check_rotary(LatentAttention, 'rotary_dim', rotary_dim, rotary)
    self.heads = heads
    self.head_dim = head_dim
    self.rotary_dim = rotary_dim
    self.value_dim = value_dim
    self.key_rank = key_rank
    self.rotary = rotary
    self.scale = (head_dim + rotary_dim) ** -0.5 if scale is None else scale
    make = functools.partial(linear, rngs=rngs)

    def per_head(size: int) -> dict[str, int]:
      return {'heads': heads, 'head_dim': size}

    query = per_head(head_dim + rotary_dim)
    self.query = None if query_rank else make({'embed': embed}, query)
    self.query_down = make({'embed': embed}, {'rank': query_rank}) if query_rank else None
    self.query_norm = norm(query_rank, rngs=rngs) if query_rank else None
    self.query_up = make({'rank': query_rank}, query) if query_rank else None
    self.key_down = make({'embed': embed}, {'rank': key_rank})
    self.key_norm = norm(key_rank, rngs=rngs)
    self.key = make({'rank': key_rank}, per_head(head_dim))
    self.value = make({'rank': key_rank}, per_head(value_dim))
    self.key_rotary = make({'embed': embed}, {'head_dim': rotary_dim})
    self.output = make(per_head(value_dim), {'embed': embed})

  def __call__(self, x: jax.Array, context: Context):
    if self.query_down is None:
      q = self.query(x)
    else:
      q = self.query_up(self.query_norm(self.query_down(x)))
    q, q_rotary = jnp.split(q, [self.head_dim], axis=-1)
    q = jnp.concatenate([q, self.rotary(q_rotary, context.positions)], axis=-1)
    latent, _ = context.recall(self.key_norm(self.key_down(x)))
    k = self.key(latent)
    v = self.value(latent)
    k_rotary = self.rotary(self.key_rotary(x)[:, :, None], context.positions)
    k_rotary, recalled_context = context.recall(k_rotary)
    if recalled_context.key_positions is not None:
      return self.output(self.absorbed(q, latent, k_rotary, recalled_context)), {}
    # Training expands keys and values to all heads, for the fused kernels.
    shared = (*k.shape[:3], self.rotary_dim)
    sharding = spec('batch', 'length', 'heads', None, shape=shared)
    k_rotary = jnp.broadcast_to(k_rotary, shared, out_sharding=sharding)
    k = jnp.concatenate([k, k_rotary], axis=-1)
    y = self_attention(q, k, v, recalled_context, scale=self.scale)
    return self.output(y), {}

  def absorbed(self, q, latent, k_rotary, context) -> jax.Array:
    """Attention over the cached latent vectors: W_K multiplies the queries and W_V the result (section 2.1.2).

    So a step need not compute the keys and values of all earlier tokens again.
    """

    def up(linear):
      return shard(linear.kernel[...].astype(q.dtype), None, 'heads', None)

    q, q_rotary = jnp.split(q, [self.head_dim], axis=-1)
    q = jnp.concatenate([jnp.einsum('bqhd,rhd->bqhr', q, up(self.key)), q_rotary], axis=-1)
    latent = latent[:, :, None]  # a single key head for all query heads
    k = jnp.concatenate([latent, k_rotary], axis=-1)
    mask, bias = recalled(context)
    y = dot_product_attention(q, k, latent, mask=mask, bias=bias, scale=self.scale)
    return jnp.einsum('bqhr,rhd->bqhd', y, up(self.value))

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The products query key^T and weights value. Decoding caches the latent vector and the rotated key."""
    pairs = length * length
    visible = length * (length + 1) // 2
    per_pair = 2 * self.heads * (self.head_dim + self.rotary_dim + self.value_dim)
    return Cost(
      full=pairs * per_pair,
      visible=visible * per_pair,
      softmax=3 * pairs * self.heads,
      cached=self.key_rank + self.rotary_dim,
    )
