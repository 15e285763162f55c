"""Fused attention on accelerators: splash attention and a kernel of our own on TPUs, cuDNN's on GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.model.kernels.tiled import LANES, Sight, tiled_attention
from research.model.positions import by_place
from research.parallel.axes import per_device, spec
from research.parallel.mesh import platform

BLOCK = 512  # queries and keys per tile of the TPU kernel; a shorter sequence is a single tile


def suits(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  causal: bool,
  window: int | None = None,
  soft_cap: float | None = None,
  bias: bool = False,
) -> bool:
  """Returns whether the devices in use have a fused kernel for this attention.

  Args:
    query: [batch, queries, heads, head_dim].
    key: [batch, keys, kv_heads, head_dim].
    value: [batch, keys, kv_heads, head_dim of value].
    causal: no token sees a later one.
    window: as in `attention.visible`.
    soft_cap: as in `dot_product_attention`; cuDNN has none.
    bias: there is a bias by distance. cuDNN would round it to bfloat16, which doubles the error of the result
      (experiments/speed/README.md, "One GPU").
  """
  if platform() == 'gpu':
    sizes = query.shape[3], value.shape[3], query.shape[1], key.shape[1]
    return not bias and _suits_cudnn(query.dtype, *sizes, causal, window, soft_cap)
  # A shorter sequence would mostly be padding.
  return platform() == 'tpu' and min(query.shape[1], key.shape[1]) >= LANES // 2


def _suits_cudnn(dtype, head_dim, width, queries, keys, causal, window, soft_cap) -> bool:
  sizes = head_dim == width and queries == keys and queries % 2 == 0
  heads = head_dim % 8 == 0 and head_dim <= 128
  half = dtype in (jnp.bfloat16, jnp.float16)
  return half and sizes and heads and soft_cap is None and (causal or window is None)


def _suits_splash(query, key, value, causal, window, plain) -> bool:
  queries, keys = query.shape[1], key.shape[1]
  whole = queries % min(queries, BLOCK) == 0 and queries % LANES == 0
  sizes = query.shape[3] == value.shape[3] and query.shape[3] % LANES == 0
  return plain and whole and sizes and queries == keys and (causal or window is None)


def flash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  segments: jax.Array | None = None,
  key_segments: jax.Array | None = None,
  prefix: jax.Array | None = None,
  bias: jax.Array | None = None,
  scale: float,
  soft_cap: float | None = None,
  causal: bool,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """softmax(scale query key^T + bias) value, tile by tile, without [query, key] in memory.

  On TPUs this is splash attention, jax's own Pallas kernel, where it serves, and else `tile_kernels.py`. On
  GPUs it is cuDNN's. Tiles that the causal mask or the window hides are not computed. cuDNN has no segments, so
  it gets a mask of them and of prefixes, [batch, query, key].

  Args:
    query: [batch, queries, heads, head_dim].
    key: [batch, keys, kv_heads, head_dim].
    value: [batch, keys, kv_heads, head_dim of value].
    segments: [batch, queries], a token sees its own segment; padding sees padding.
    key_segments: [batch, keys], if they are of another sequence; queries without segments are of segment 1.
    prefix: bool, [batch, queries]; two tokens of a prefix see each other in spite of `causal`.
    bias: [heads, 2 queries - 1]: entry queries - 1 + d is added to the logit of a key d places after the query.
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c) (Gemma 2).
    causal: no token sees a later one.
    window: as in `attention.visible`.
    interpret: runs the TPU kernel in Python, for tests.

  Returns:
    [batch, queries, heads, head_dim of value].
  """
  q_spec = spec('batch', 'length', 'heads', None, shape=query.shape)
  kv_spec = spec('batch', None, 'kv_heads', None, shape=key.shape)
  if q_spec[2] != kv_spec[2]:
    # There are fewer key heads than devices: every device repeats those that its queries need.
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    kv_spec = jax.P(*kv_spec[:2], q_spec[2], None)
  knobs = {'scale': scale, 'causal': causal, 'window': window}
  plain = bias is None and prefix is None and key_segments is None
  if key_segments is not None and segments is None:
    segments = jnp.ones(query.shape[:2], key_segments.dtype)
  key_segments = segments if key_segments is None else key_segments
  if platform() == 'gpu':
    local = functools.partial(_cudnn, **knobs)
  else:
    splash = _suits_splash(query, key, value, causal, window, plain)
    local = functools.partial(
      _splash if splash else tiled_attention, soft_cap=soft_cap, interpret=interpret, **knobs
    )
  rows, key_rows = jax.P(*q_spec[:2]), jax.P(kv_spec[0], None)
  sight = Sight(segments, key_segments, prefix, bias)
  sight_specs = Sight(rows, key_rows, rows, jax.P(q_spec[2], None))
  sight_specs = Sight(*(None if x is None else s for x, s in zip(sight, sight_specs, strict=True)))
  specs = (q_spec, kv_spec, kv_spec, sight_specs)
  arrays = jax.tree.map(jax.sharding.reshard, (query, key, value, sight), specs)
  return per_device(local, in_specs=specs, out_specs=q_spec)(*arrays)


def _cudnn(query, key, value, sight, *, scale, causal, window, implementation='cudnn'):
  segments, key_segments, prefix, bias = sight
  mask = None
  if segments is not None:
    mask = (segments[:, :, None] == key_segments[:, None])[:, None]
  if causal and prefix is not None:
    place = jnp.arange(query.shape[1])
    sees = (place[:, None] >= place) | (prefix[:, :, None] & prefix[:, None])
    if window is not None:
      sees &= jnp.abs(place[:, None] - place) < window
    mask = sees[:, None] if mask is None else sees[:, None] & mask
    causal, window = False, None
  near = None if window is None else (window - 1, 0)
  if bias is not None:
    bias = by_place(bias.astype(query.dtype), query.shape[1])[None]
  return jax.nn.dot_product_attention(
    query, key, value, bias=bias, mask=mask, scale=scale, is_causal=causal, local_window_size=near,
    implementation=implementation,
  )  # fmt: skip


def _splash(query, key, value, sight, *, scale, causal, window, soft_cap, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length = query.shape[1]
  block = min(length, BLOCK)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  shape = (length, length)
  if window is not None:
    mask = splash.LocalMask(shape, (window - 1, 0), 0)
  else:
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
  heads = splash.MultiHeadMask([mask] * query.shape[2])
  kernel = splash.make_splash_mha_single_device(
    heads, block_sizes=sizes, attn_logits_soft_cap=soft_cap, interpret=interpret
  )

  def one_sequence(q, k, v, segment):
    ids = None if segment is None else splash.SegmentIds(segment, segment)
    # The kernel has heads before the length, and no factor of the logits.
    heads_first = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
    q = heads_first(q) * np.asarray(scale, q.dtype)
    return heads_first(kernel(q, heads_first(k), heads_first(v), ids))

  in_axes = (0, 0, 0, None if sight.segments is None else 0)
  return jax.vmap(one_sequence, in_axes=in_axes)(query, key, value, sight.segments)
