"""Where a token stands: rotations of queries and keys, or biases on their products.

Learned positions are added by `models.Embedder`; a model without any of these has none.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.model.layers import check_sizes, normal, param


def rotary(
  x: jax.Array, positions: jax.Array, *, base: float = 10_000.0, fraction: float = 1.0
) -> jax.Array:
  """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in GPT-NeoX and LLaMA.

  Args:
    x: [batch, length, heads, head_dim].
    positions: [batch, length].
    base: the longest wavelength is 2 pi base.
    fraction: of head_dim that is rotated; the rest passes.
  """
  rotated = int(x.shape[-1] * fraction)
  frequency = base ** (-np.arange(0, rotated, 2, dtype=np.float32) / rotated)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
  return jnp.concatenate([y, x[..., rotated:]], axis=-1) if rotated < x.shape[-1] else y


class RelativePositionBias(nnx.Module):
  """T5's learned bias per head and bucket of distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

  Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance`. Called with a
  length it gives [1, heads, length, length]: packed documents are contiguous, so the distance between two
  tokens of one document is the distance between their places in the row.
  """

  def __init__(
    self,
    *,
    heads: int,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool,
    rngs: nnx.Rngs,
  ):
    check_sizes(RelativePositionBias, heads=heads, buckets=buckets, max_distance=max_distance)
    self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
    self.table = param(rngs, (buckets, heads), (None, 'heads'), normal)

  def __call__(self, length: int) -> jax.Array:
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    buckets, first = self.buckets, np.zeros_like(distance)
    if self.bidirectional:
      buckets //= 2
      first = np.where(distance > 0, buckets, 0)
      distance = np.abs(distance)
    else:
      distance = np.maximum(-distance, 0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(self.max_distance / exact)
    # float32, as the reference computes it: a bucket's edge must fall on the same side.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = exact + (np.log(ratio) * np.float32(scale)).astype(np.int32)
    index = first + np.where(distance < exact, distance, np.minimum(far, buckets - 1))
    bias = self.table[...].at[index].get(out_sharding=jax.P(None, None, *_heads_spec(self.table)))
    return jnp.moveaxis(bias, -1, 0)[None]


def _heads_spec(table):
  return (jax.typeof(table[...]).sharding.spec or (None, None))[1:]


class ALiBi(nnx.Module):
  """A fixed bias of -slope x distance per head (Press et al. 2022, arXiv:2108.12409).

  The slopes are the paper's geometric sequence; for a number of heads that is not a power of two, those of
  the power below and then every other one of the power above (the authors' code).
  """

  def __init__(self, *, heads: int, rngs: nnx.Rngs):
    check_sizes(ALiBi, heads=heads)
    self.heads = heads

  def __call__(self, length: int) -> jax.Array:
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    bias = np.asarray(alibi_slopes(self.heads), np.float32)[:, None, None] * distance
    return jnp.asarray(bias[None], jnp.float32)


def alibi_slopes(heads: int) -> list[float]:
  power = 2 ** math.floor(math.log2(heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  more = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
  return slopes + more[: heads - power]
