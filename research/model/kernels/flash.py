"""Fused attention on accelerators that have a kernel for it: splash attention on TPUs, cuDNN's on GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.parallel.axes import per_device, spec
from research.parallel.mesh import platform

BLOCK = 512  # queries and keys per tile of the TPU kernel; a shorter sequence is a single tile
LANES = 128  # the sizes of its tiles must be multiples of this


def suits(
  query: jax.Array,
  value: jax.Array,
  *,
  causal: bool,
  window: int | None,
  soft_cap: float | None,
  plain: bool,
) -> bool:
  """Returns whether the devices in use have a fused kernel for this attention of a sequence to itself.

  Args:
    query: [batch, length, heads, head_dim].
    value: [batch, length, kv_heads, head_dim].
    causal: no token sees a later one.
    window: as in `attention.visible`; kernels have windows only together with `causal`.
    soft_cap: as in `dot_product_attention`; cuDNN has none.
    plain: there is no bias and no prefix, and every device has whole lengths.
  """
  length, head_dim = query.shape[1], query.shape[3]
  if not plain or value.shape[3] != head_dim or not (causal or window is None):
    return False
  if platform() == 'gpu':
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and soft_cap is None and head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0
  tiles = length % min(length, BLOCK) == 0 and length % LANES == 0 and head_dim % LANES == 0
  return platform() == 'tpu' and tiles


def flash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  segments: jax.Array | None,
  scale: float,
  soft_cap: float | None = None,
  causal: bool,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """softmax(scale query key^T) value of a sequence to itself, tile by tile, without [query, key] in memory.

  On TPUs this is splash attention, jax's own Pallas kernel, and on GPUs cuDNN's. Tiles that the causal mask or
  the window hides are not computed. cuDNN has no segments, so it gets a mask of them, [batch, query, key].

  Args:
    query: [batch, length, heads, head_dim].
    key: [batch, length, kv_heads, head_dim].
    value: [batch, length, kv_heads, head_dim].
    segments: [batch, length], a token sees its own segment; padding sees padding.
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c) (Gemma 2).
    causal: no token sees a later one.
    window: as in `attention.visible`.
    interpret: runs the TPU kernel in Python, for tests.

  Returns:
    [batch, length, heads, head_dim].
  """
  q_spec = spec('batch', None, 'heads', None, shape=query.shape)
  kv_spec = spec('batch', None, 'kv_heads', None, shape=key.shape)
  if q_spec[2] != kv_spec[2]:
    # There are fewer key heads than devices: every device repeats those that its queries need.
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    kv_spec = q_spec
  knobs = {'scale': scale, 'causal': causal, 'window': window}
  if platform() == 'gpu':
    local = functools.partial(_cudnn, **knobs)
  else:
    local = functools.partial(_splash, soft_cap=soft_cap, interpret=interpret, **knobs)
  specs = (q_spec, kv_spec, kv_spec, spec('batch', None))
  query, key, value = (
    jax.sharding.reshard(x, s) for x, s in zip((query, key, value), specs, strict=False)
  )
  return per_device(local, in_specs=specs, out_specs=q_spec)(query, key, value, segments)


def _cudnn(query, key, value, segments, *, scale, causal, window, implementation='cudnn'):
  mask = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
  near = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, scale=scale, is_causal=causal, local_window_size=near,
    implementation=implementation,
  )  # fmt: skip


def _splash(query, key, value, segments, *, scale, causal, window, soft_cap, interpret):
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

  in_axes = (0, 0, 0, None if segments is None else 0)
  return jax.vmap(one_sequence, in_axes=in_axes)(query, key, value, segments)
