"""Fused attention where the accelerator has a kernel for it: splash attention on TPU, cuDNN's on GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.parallel.axes import per_device, spec
from research.parallel.mesh import platform

BLOCK = 512  # queries and keys in a tile of the kernel; a shorter sequence is one tile
LANES = 128  # what the kernel's tiles are multiples of


def suits(
  query: jax.Array,
  value: jax.Array,
  *,
  causal: bool,
  window: int | None,
  soft_cap: float | None,
  plain: bool,
) -> bool:
  """Whether this attention of a sequence with itself has a fused kernel on the devices in use.

  Args:
    query, value: [batch, length, heads, head_dim].
    causal: no token sees a later one.
    window: of the keys that a query sees; a kernel has it only where it is causal.
    soft_cap: of the logits; cuDNN has none.
    plain: there is no bias, no prefix, and the length is whole on every device.
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
  """softmax(scale query key^T) value of a sequence with itself, tile by tile; no [query, key] logits in memory.

  Splash attention, jax's own Pallas kernel, on TPUs, and cuDNN's on GPUs: tiles that the causal mask or the
  window hides are not computed. cuDNN knows no segments: it is given a mask of them, [batch, query, key].

  Args:
    query: [batch, length, heads, head_dim]; key, value: [batch, length, kv_heads, head_dim].
    segments: [batch, length], a token sees its own segment; padding sees padding.
    interpret: run the kernel in Python, for tests.
  """
  q_spec = spec('batch', None, 'heads', None, shape=query.shape)
  kv_spec = spec('batch', None, 'kv_heads', None, shape=key.shape)
  if q_spec[2] != kv_spec[2]:
    # Fewer keys than devices: every device repeats those of its own queries.
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

  def one(q, k, v, segment):
    ids = None if segment is None else splash.SegmentIds(segment, segment)
    first = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
    return first(kernel(first(q) * np.asarray(scale, q.dtype), first(k), first(v), ids))

  return jax.vmap(one, in_axes=(0, 0, 0, None if segments is None else 0))(
    query, key, value, segments
  )
