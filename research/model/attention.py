"""Attention: its masks, and the parts that project queries, keys and values."""

import functools
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
from research.model.positions import by_place, check_rotary
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
  """Returns the mask of attention, [batch or 1, 1, query, key]: True if the query may see the key.

  A query sees only keys of its own segment.

  Args:
    query_segments: [batch, query], the packed document of every query; None for unpacked rows.
    key_segments: [batch, key]; None if every key is visible to every query in this respect.
    length: the number of queries and of keys.
    causal: hides later keys, except that two tokens of one prefix see each other.
    prefix: [batch, length] bool, the tokens of a prefix.
    window: hides keys that are `window` or more tokens away.

  Returns:
    The mask, or None if every query sees every key.
  """
  distance = np.arange(length[0])[:, None] - np.arange(length[1])[None, :]
  see = None
  if causal:
    see = jnp.asarray(distance >= 0)[None]
    if prefix is not None:
      see = see | (prefix[:, :, None] & _whole(prefix)[:, None, :])
  if window is not None:
    in_window = jnp.asarray(np.abs(distance) < window)[None]
    see = in_window if see is None else see & in_window
  if key_segments is not None:
    if query_segments is None:  # unpacked rows: one document each, then padding
      query_segments = jnp.ones((1, length[0]), key_segments.dtype)
    same_segment = query_segments[:, :, None] == _whole(key_segments)[:, None, :]
    see = same_segment if see is None else see & same_segment
  return None if see is None else see[:, None]


def _whole(x):
  """Gathers the length of keys [batch, length] to every device, which may have only a part of the queries."""
  return shard(x, 'batch', None)


def recalled(context: Context, window: int | None = None) -> tuple[jax.Array, jax.Array | None]:
  """Returns the mask and the bias for the keys of a decoding state, by their positions.

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
  # The middle entry is that of distance 0; the entries before it are those of earlier keys.
  index = jnp.maximum(bias.shape[1] // 2 - distance, 0)
  bias = bias.at[:, index].get(out_sharding=spec('heads', 'batch', None, None))
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
  """Attention of a sequence to itself, by the fastest kernel that can compute it on the mesh in use.

  Args:
    query: [batch, length, heads, head_dim].
    key: [batch, length, kv_heads, head_dim].
    value: [batch, length, kv_heads, head_dim of value].
    context: segments, prefix, causality and the bias.
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c) (Gemma 2).
    window: as in `visible`.

  Returns:
    [batch, length, heads, head_dim of value].
  """
  segments = context.segments
  prefix = context.prefix
  length = query.shape[1]
  knobs = {'scale': scale, 'soft_cap': soft_cap}
  if context.key_positions is not None:
    mask, bias = recalled(context, window)
    return dot_product_attention(query, key, value, mask=mask, bias=bias, **knobs)
  if is_split(length):
    return ring_attention(
      query, key, value, segments=segments, prefix=prefix, bias=context.bias, causal=context.causal,
      window=window, **knobs,
    )  # fmt: skip
  has_bias = context.bias is not None
  if flash.suits(
    query, key, value, causal=context.causal, window=window, soft_cap=soft_cap, bias=has_bias
  ):
    return flash.flash_attention(
      query, key, value, segments=segments, prefix=prefix, bias=context.bias, causal=context.causal,
      window=window, **knobs,
    )  # fmt: skip
  mask = visible(
    segments, segments, (length, length), causal=context.causal, prefix=prefix, window=window
  )
  # With a prefix some queries see later keys, so the product must not skip them.
  causal = context.causal and prefix is None
  key, value = (shard(y, 'batch', None, 'kv_heads', None) for y in (key, value))
  bias = None if context.bias is None else by_place(context.bias, length)[None]
  return dot_product_attention(query, key, value, mask=mask, bias=bias, causal=causal, **knobs)


class Attention(nnx.Module):
  """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

  Grouped-query with `kv_heads` < heads (Ainslie et al. 2023, arXiv:2305.13245), multi-query with 1.

  Knobs:
    rotary: rotates queries and keys by position (`positions.rotary`).
    qk_norm: a norm of queries and keys, over head_dim (Qwen 3).
    qk_norm_heads: the norm is over all heads together (OLMo 2).
    scale: the factor of the logits; None is head_dim^-1/2. T5 has 1, and initialises its queries smaller by
      that factor.
    soft_cap: c in c tanh(logits / c) (Gemma 2).
    window: a query sees itself and the window - 1 keys before it (Mistral).
    clip: queries, keys and values are clipped to [-clip, clip] after their projections (MPT).
    qkv_bias, output_bias: the projections have biases.
    prefix: makes learned keys and values that every token sees beside the others (`prefixes.Prefix`).
  """

  # Decoding on a CPU joins the matrices of these layers (inference/by_output.py).
  same_input = ('query', 'key', 'value')

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
    prefix: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    check_sizes(type(self), heads=heads, head_dim=head_dim, kv_heads=kv_heads, window=window)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
      raise Invalid(type(self), 'kv_heads', f'{kv_heads} does not divide the {heads} heads.')
    check_rotary(type(self), 'head_dim', head_dim, rotary)
    self.heads = heads
    self.kv_heads = kv_heads
    self.head_dim = head_dim
    self.rotary = rotary
    self.soft_cap = soft_cap
    self.window = window
    self.clip = clip
    self.scale = head_dim**-0.5 if scale is None else scale
    query_scale = (head_dim**-0.5 / self.scale) ** 2
    make = functools.partial(linear, {'embed': embed}, bias=qkv_bias, rngs=rngs)
    self.query = make({'heads': heads, 'head_dim': head_dim}, init_scale=query_scale)
    self.key = make({'kv_heads': kv_heads, 'head_dim': head_dim}, init_scale=1.0)
    self.value = make({'kv_heads': kv_heads, 'head_dim': head_dim}, init_scale=1.0)
    self.output = linear(
      {'heads': heads, 'head_dim': head_dim}, {'embed': embed}, bias=output_bias, rngs=rngs
    )
    query_width = head_dim * (heads if qk_norm_heads else 1)
    key_width = head_dim * (kv_heads if qk_norm_heads else 1)
    self.query_norm = qk_norm(query_width, rngs=rngs) if qk_norm else None
    self.key_norm = qk_norm(key_width, rngs=rngs) if qk_norm else None
    self.qk_norm_heads = qk_norm_heads
    self.prefix = prefix(kv_heads, head_dim, rngs=rngs) if prefix else None

  def __call__(self, x: jax.Array, context: Context):
    q, k, v = self.project(x, x, context)
    k, v, context = context.recall(k, v, window=self.window)
    attend = self_attention if self.prefix is None else self.prefix.attend
    y = attend(q, k, v, context, scale=self.scale, soft_cap=self.soft_cap, window=self.window)
    return self.output(y), {}

  def project(self, x, source, context):
    """Returns the queries of x, and the keys and values of `source`, normalised and rotated."""
    q, k, v = self.query(x), self.key(source), self.value(source)
    if self.clip is not None:
      q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
    if self.query_norm is not None:
      q = self.norm(self.query_norm, q, 'heads')
      k = self.norm(self.key_norm, k, 'kv_heads')
    if self.rotary is not None:
      q = self.rotary(q, context.positions)
      k = self.rotary(k, context.positions)
    return q, k, v

  def norm(self, norm, x, axis):
    """Normalises x [batch, length, heads, head_dim] over head_dim, or over heads and head_dim together."""
    if not self.qk_norm_heads:
      return norm(x)
    flat = shard(x, 'batch', 'length', None, None).reshape(*x.shape[:2], -1)
    return shard(norm(flat).reshape(x.shape), 'batch', 'length', axis, None)

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The products query key^T and weights value. Decoding caches keys and values."""
    window = min(self.window or length, length)
    # The causal mask leaves a band of `window` keys, less the triangle that lies before the first token.
    pairs = length * window
    visible = pairs - window * (window - 1) // 2
    per_pair = 4 * self.heads * self.head_dim
    if self.prefix is not None:
      pairs += length * self.prefix.length
      visible += length * self.prefix.length
    return Cost(
      full=pairs * per_pair,
      visible=visible * per_pair,
      softmax=3 * pairs * self.heads,
      cached=2 * self.kv_heads * self.head_dim,
    )


class CrossAttention(Attention):
  """Attention from the decoder to the encoder's output, without a position bias. Only padding is hidden."""

  same_input = ('key', 'value')

  def __call__(self, x: jax.Array, context: Context):
    if self.prefix is not None:
      raise Invalid(CrossAttention, 'prefix', 'is for attention within a sequence; leave it None.')
    lengths = (x.shape[1], context.encoded.shape[1])
    mask = visible(context.segments, context.encoded_segments, lengths, causal=False)
    q, k, v = self.project(x, context.encoded, context)
    k, v = context.once(k, v)
    knobs = {'scale': self.scale, 'soft_cap': self.soft_cap}
    if flash.suits(q, k, v, causal=False, soft_cap=self.soft_cap):
      segments = context.segments if mask is not None else None
      knobs |= {'segments': segments, 'key_segments': context.encoded_segments}
      return self.output(flash.flash_attention(q, k, v, causal=False, **knobs)), {}
    # If the mesh splits lengths, every device compares its queries with all keys.
    k, v = (shard(y, 'batch', None, 'kv_heads', None) for y in (k, v))
    return self.output(dot_product_attention(q, k, v, mask=mask, **knobs)), {}

  def cost(self, length: int, encoder_length: int) -> Cost:
    """As for `Attention`, but the keys are the tokens of the encoder, and all are visible."""
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
