"""Fused attention where the accelerator has a kernel for it: splash attention on TPU."""

import functools

import jax
import numpy as np

from research.sharding import per_device, platform, spec

BLOCK = 512  # queries and keys in a tile of the kernel; a shorter sequence is one tile
LANES = 128  # what the kernel's tiles are multiples of


def suits(
  query: jax.Array, value: jax.Array, *, causal: bool, window: int | None, plain: bool
) -> bool:
  """Whether this attention of a sequence with itself has a fused kernel on the devices in use.

  Args:
    query, value: [batch, length, heads, head_dim].
    causal: no token sees a later one.
    window: of the keys that a query sees; a kernel has it only where it is causal.
    plain: there is no bias, no prefix, and the length is whole on every device.
  """
  length, head_dim = query.shape[1], query.shape[3]
  tiles = length % min(length, BLOCK) == 0 and length % LANES == 0 and head_dim % LANES == 0
  same = value.shape[3] == head_dim
  return platform() == 'tpu' and plain and tiles and same and (causal or window is None)


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
  """softmax(scale query key^T) value of a sequence with itself, tile by tile; no [query, key] is in memory.

  Splash attention, jax's own Pallas kernel: tiles that the causal mask or the window hides are not computed.

  Args:
    query: [batch, length, heads, head_dim]; key, value: [batch, length, kv_heads, head_dim].
    segments: [batch, length], a token sees its own segment; padding sees padding.
    interpret: run the kernel in Python, for tests.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, kv_heads = query.shape[1], key.shape[2]
  q_spec = spec('batch', None, 'heads', None, shape=query.shape)
  kv_spec = spec('batch', None, 'kv_heads', None, shape=key.shape)
  if (
    q_spec[2] != kv_spec[2]
  ):  # fewer keys than devices: every device repeats those of its own queries
    key, value = (jax.numpy.repeat(x, query.shape[2] // kv_heads, axis=2) for x in (key, value))
    kv_spec = q_spec
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

  def local(query, key, value, segments):
    heads = splash.MultiHeadMask([mask] * query.shape[2])
    kernel = splash.make_splash_mha_single_device(
      heads, block_sizes=sizes, attn_logits_soft_cap=soft_cap, interpret=interpret
    )

    def one(q, k, v, segment):
      ids = None if segment is None else splash.SegmentIds(segment, segment)
      first = functools.partial(jax.numpy.swapaxes, axis1=0, axis2=1)
      return first(kernel(first(q) * np.asarray(scale, q.dtype), first(k), first(v), ids))

    return jax.vmap(one, in_axes=(0, 0, 0, None if segments is None else 0))(
      query, key, value, segments
    )

  specs = (q_spec, kv_spec, kv_spec, spec('batch', None))
  query, key, value = (
    jax.sharding.reshard(x, s) for x, s in zip((query, key, value), specs, strict=False)
  )
  return per_device(local, in_specs=specs, out_specs=q_spec)(query, key, value, segments)
