"""Attention: who may see whom, and the part around the product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.model.kernels import flash
from research.model.kernels.dot_product import dot_product_attention
from research.model.kernels.ring import ring_attention
from research.model.kernels.split_sequence import is_split
from research.model.layers import Linear
from research.model.parameters import check_sizes, size
from research.model.part import Context, Cost, Factory
from research.model.positions import by_place
from research.parallel.axes import shard, spec


def visible(
  query_segments: jax.Array | None,
  key_segments: jax.Array | None,
  length: tuple[int, int],
  *,
  causal: bool,
  prefix: jax.Array | None = None,
  window: int | None = None,
) -> jax.Array | None:
  """[batch or 1, 1, query, key] bool: may the query see the key? None: every query sees every key.

  Causal means no later key, except that two tokens of one prefix see each other; a window of w means no key
  w or more places back; a segment sees only itself.
  """
  distance = np.arange(length[0])[:, None] - np.arange(length[1])[None, :]
  see = None
  if causal:
    see = jnp.asarray(distance >= 0)[None]
    if prefix is not None:
      see = see | (prefix[:, :, None] & _whole(prefix)[:, None, :])
  if window is not None:
    near = jnp.asarray(np.abs(distance) < window)[None]
    see = near if see is None else see & near
  if key_segments is not None:
    if query_segments is None:  # unpacked: one document a row, padding behind it
      query_segments = jnp.ones((1, length[0]), key_segments.dtype)
    same = query_segments[:, :, None] == _whole(key_segments)[:, None, :]
    see = same if see is None else see & same
  return None if see is None else see[:, None]


def _whole(x):
  """[batch, length] of keys: all of the length, of which a device may have only its part of the queries."""
  return shard(x, 'batch', None)


def recalled(context: Context, window: int | None = None) -> tuple[jax.Array, jax.Array | None]:
  """Who sees whom among recalled keys, and the bias, by the keys' positions.

  Returns:
    A mask [batch, 1, query, key], and the bias [batch, heads, query, key] or None.
  """
  keys = context.key_positions[:, None, :]
  distance = context.positions[:, :, None] - keys
  see = (keys >= 0) & (distance >= 0)
  if window is not None:
    see = see & (distance < window)
  if context.bias is None:
    return see[:, None], None
  bias = shard(context.bias, 'heads', None)
  place = jnp.maximum(bias.shape[1] // 2 - distance, 0)
  bias = bias.at[:, place].get(out_sharding=spec('heads', 'batch', None, None))
  return see[:, None], jnp.swapaxes(bias, 0, 1)


def self_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  context: Context,
  *,
  scale: float,
  soft_cap: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """The product of a sequence with itself, in a ring of devices where they split its length.

  Args:
    query: [batch, length, heads, head_dim]; key, value: [batch, length, kv_heads, head_dim].
    context: who sees whom, and the bias.
    window: as in `visible`.

  Returns:
    [batch, length, heads, head_dim of value].
  """
  segments, prefix, length = context.segments, context.prefix, query.shape[1]
  knobs = {'scale': scale, 'soft_cap': soft_cap}
  if context.key_positions is not None:
    mask, bias = recalled(context, window)
    return dot_product_attention(query, key, value, mask=mask, bias=bias, **knobs)
  if is_split(length):
    return ring_attention(
      query, key, value, segments=segments, prefix=prefix, bias=context.bias, causal=context.causal,
      window=window, **knobs,
    )  # fmt: skip
  plain = prefix is None and context.bias is None
  if flash.suits(
    query, value, causal=context.causal, window=window, soft_cap=soft_cap, plain=plain
  ):
    return flash.flash_attention(
      query, key, value, segments=segments, causal=context.causal, window=window, **knobs
    )
  mask = visible(
    segments, segments, (length, length), causal=context.causal, prefix=prefix, window=window
  )
  causal = context.causal and prefix is None  # every later key is hidden, whatever the batch holds
  key, value = (shard(y, 'batch', None, 'kv_heads', None) for y in (key, value))
  bias = None if context.bias is None else by_place(context.bias, length)[None]
  return dot_product_attention(query, key, value, mask=mask, bias=bias, causal=causal, **knobs)


class Attention(nnx.Module):
  """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

  Grouped-query with `kv_heads` < heads (Ainslie et al. 2023, arXiv:2305.13245), multi-query with 1.

  Knobs:
    rotary: rotates queries and keys by position (`positions.rotary`).
    qk_norm: a norm of queries and keys, over head_dim (Qwen 3);
    qk_norm_heads: over all heads together (OLMo 2).
    scale: of the logits; head_dim^-1/2 by default. T5 takes 1 and starts its queries smaller by that factor.
    window: a query sees itself and the window - 1 keys before it (Mistral).
    clip: queries, keys and values are clipped to [-clip, clip] as they come from their projections (MPT).
  """

  def __init__(
    self,
    embed: int,
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    rotary: Callable[..., jax.Array] | None = None,
    qk_norm: Factory | None = None,
    qk_norm_heads: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    clip: float | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(type(self), heads=heads, head_dim=head_dim, kv_heads=kv_heads, window=window)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
      raise Invalid(type(self), 'kv_heads', f'{kv_heads} does not divide the {heads} heads.')
    self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
    self.rotary, self.soft_cap, self.window = rotary, soft_cap, window
    self.clip = clip
    self.scale = head_dim**-0.5 if scale is None else scale
    query_scale = (head_dim**-0.5 / self.scale) ** 2
    make = lambda axis, n, scale=1.0: linear(
      {'embed': embed}, {axis: n, 'head_dim': head_dim}, bias=qkv_bias, init_scale=scale, rngs=rngs
    )
    self.query = make('heads', heads, query_scale)
    self.key, self.value = make('kv_heads', kv_heads), make('kv_heads', kv_heads)
    self.output = linear(
      {'heads': heads, 'head_dim': head_dim}, {'embed': embed}, bias=output_bias, rngs=rngs
    )
    over = lambda n: head_dim * n if qk_norm_heads else head_dim
    self.query_norm = qk_norm(over(heads), rngs=rngs) if qk_norm else None
    self.key_norm = qk_norm(over(kv_heads), rngs=rngs) if qk_norm else None
    self.qk_norm_heads = qk_norm_heads

  def __call__(self, x: jax.Array, context: Context):
    q, k, v = self.project(x, x, context)
    k, v, context = context.recall(k, v, window=self.window)
    y = self_attention(
      q, k, v, context, scale=self.scale, soft_cap=self.soft_cap, window=self.window
    )
    return self.output(y), {}

  def project(self, x, source, context):
    """Queries of x, keys and values of the source: normalised and rotated."""
    q, k, v = self.query(x), self.key(source), self.value(source)
    if self.clip is not None:
      q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
    if self.query_norm is not None:
      q, k = self.norm(self.query_norm, q, 'heads'), self.norm(self.key_norm, k, 'kv_heads')
    if self.rotary is not None:
      q, k = self.rotary(q, context.positions), self.rotary(k, context.positions)
    return q, k, v

  def norm(self, norm, x, axis):
    if not self.qk_norm_heads:
      return norm(x)
    flat = shard(x, 'batch', 'length', None, None).reshape(*x.shape[:2], -1)
    return shard(norm(flat).reshape(x.shape), 'batch', 'length', axis, None)

  def cost(self, length: int, encoder_length: int) -> Cost:
    """Two products, query key^T and weights value, and the keys and values that decoding keeps."""
    window = min(self.window or length, length)
    # The causal mask leaves a band of `window` keys without the corner before the first token.
    pairs, visible = length * window, length * window - window * (window - 1) // 2
    per_pair = 4 * self.heads * self.head_dim
    return Cost(
      full=pairs * per_pair,
      visible=visible * per_pair,
      softmax=3 * pairs * self.heads,
      cached=2 * self.kv_heads * self.head_dim,
    )


class CrossAttention(Attention):
  """Attention from the decoder to the encoder's output: no position bias, nothing hidden but padding."""

  def __call__(self, x: jax.Array, context: Context):
    lengths = (x.shape[1], context.encoded.shape[1])
    mask = visible(context.segments, context.encoded_segments, lengths, causal=False)
    q, k, v = self.project(x, context.encoded, context)
    k, v = context.once(k, v)
    # Where lengths are split, every device takes its queries to all of the keys.
    k, v = (shard(y, 'batch', None, 'kv_heads', None) for y in (k, v))
    y = dot_product_attention(q, k, v, mask=mask, scale=self.scale, soft_cap=self.soft_cap)
    return self.output(y), {}

  def cost(self, length: int, encoder_length: int) -> Cost:
    """As `Attention`'s, but the keys are the encoder's tokens, and none of them is hidden."""
    pairs = length * encoder_length
    flops = 4 * pairs * self.heads * self.head_dim
    of_encoder = (self.key, self.value)
    return Cost(
      full=flops,
      visible=flops,
      softmax=3 * pairs * self.heads,
      cached_encoder=2 * self.kv_heads * self.head_dim,
      encoder_params=sum(map(size, of_encoder)),
      encoder_matrices=sum(size(module, 'matrix') for module in of_encoder),
    )
