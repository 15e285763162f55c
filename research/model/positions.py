"""Positions: rotations of queries and keys, and biases on the logits of attention.

Learned positions are in `embedder.Embedder`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.model.parameters import check_sizes, normal, param

# What a scaling of rotary frequencies returns: the new frequencies [rotated / 2], and a factor of cos and sin.
Scaled = tuple[np.ndarray, float]


def rotary(
  x: jax.Array,
  positions: jax.Array,
  *,
  base: float = 10_000.0,
  fraction: float = 1.0,
  interleaved: bool = False,
  scaling: Callable[[np.ndarray], Scaled] | None = None,
) -> jax.Array:
  """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

  Args:
    x: [batch, length, heads, head_dim].
    positions: [batch, length].
    base: the longest wavelength is 2 pi base.
    fraction: the fraction of head_dim that is rotated, an even number of channels; the others are unchanged.
    interleaved: pairs are (0, 1), (2, 3), ... as in the paper, GPT-J, GLM and DeepSeek; otherwise
      (0, n/2), (1, n/2 + 1), ... as in GPT-NeoX and LLaMA.
    scaling: changes the frequencies for a longer context than in training (`linear_scaling` and the others).

  Returns:
    An array of the shape and dtype of x.
  """
  rotated = _rotated(x.shape[-1], fraction)
  frequency = base ** (-np.arange(0, rotated, 2, dtype=np.float32) / rotated)
  frequency, magnitude = scaling(frequency) if scaling else (frequency, 1.0)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency.astype(np.float32)
  cos = jnp.cos(angle) * magnitude
  sin = jnp.sin(angle) * magnitude
  y = x[..., :rotated]
  if interleaved:
    y = y.reshape(*y.shape[:-1], rotated // 2, 2)
    a = y[..., 0]
    b = y[..., 1]
  else:
    a, b = jnp.split(y, 2, axis=-1)
  # In float32, but one half at a time, so that no float32 array is as large as x.
  a = a.astype(jnp.float32)
  b = b.astype(jnp.float32)
  pair = (a * cos - b * sin).astype(x.dtype), (a * sin + b * cos).astype(x.dtype)
  if interleaved:
    y = jnp.stack(pair, axis=-1).reshape(x[..., :rotated].shape)
  else:
    y = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([y, x[..., rotated:]], axis=-1) if rotated < x.shape[-1] else y


def _rotated(size: int, fraction: float) -> int:
  """Returns how many of `size` channels are rotated."""
  return int(size * fraction)


def check_rotary(
  owner: type, field: str, size: int, rotate: Callable[..., jax.Array] | None
) -> None:
  """Raises `Invalid` if `rotary` cannot rotate vectors of this size, before any is made.

  Args:
    owner: the class that rotates.
    field: its argument that is the size.
    size: the channels that are given to `rotate`.
    rotate: `rotary`, or a `functools.partial` of it. Of any other function nothing is known.
  """
  if getattr(rotate, 'func', rotate) is not rotary:
    return
  fraction = getattr(rotate, 'keywords', {}).get('fraction', 1.0)
  rotated = _rotated(size, fraction)
  if rotated % 2 == 0 and 0 < rotated <= size:
    return
  if fraction == 1:
    raise Invalid(
      owner, field, f'{size} is odd, and rotary positions turn pairs of channels: make it even.'
    )
  raise Invalid(
    owner,
    field,
    f'rotary positions turn pairs of channels, and rotary.fraction = {fraction} of {size} is {rotated}: change '
    f'one of the two, so that it is an even number from 2 to {size}.',
  )


def linear_scaling(frequency: np.ndarray, *, factor: float) -> Scaled:
  """Position interpolation (Chen et al. 2023, arXiv:2306.15595): all frequencies divided by the factor."""
  return frequency / factor, 1.0


def ntk_scaling(frequency: np.ndarray, *, factor: float) -> Scaled:
  """NTK-aware interpolation (see arXiv:2309.00071, section 3.1): base x factor^(d / (d - 2)).

  The highest frequency stays, and the lowest is divided by the factor.
  """
  n = len(frequency)
  return frequency * factor ** (-np.arange(n) / max(n - 1, 1)), 1.0


def llama3_scaling(
  frequency: np.ndarray,
  *,
  factor: float = 8.0,
  low: float = 1.0,
  high: float = 4.0,
  original_length: int = 8192,
) -> Scaled:
  """The scaling of Llama 3.1, by how often a pair turns within the original length.

  A pair that turns more than `high` times keeps its frequency. The frequency of a pair that turns less than
  `low` times is divided by the factor. Between the two it is interpolated.
  """
  turns = original_length * frequency / (2 * np.pi)
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return keep * frequency + (1 - keep) * frequency / factor, 1.0


def yarn_scaling(
  frequency: np.ndarray,
  *,
  factor: float,
  original_length: int,
  fast: float = 32.0,
  slow: float = 1.0,
  truncate: bool = True,
  magnitude: float | None = None,
) -> Scaled:
  """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 22).

  As `llama3_scaling`, but the interpolation is linear in the index of the pair.

  Args:
    frequency: [rotated / 2].
    factor: how many times longer the context is than in training.
    original_length: the length in training.
    fast: the interpolation begins at the last pair that turns so often within that length.
    slow: it ends at the first pair that turns so often.
    truncate: rounds both to whole pairs.
    magnitude: the factor of cos and sin; None is 0.1 ln factor + 1.
  """
  n = len(frequency)
  # The difference of log frequency between neighbouring pairs.
  step = math.log(frequency[0] / frequency[-1]) / max(n - 1, 1)

  def index(turns: float) -> float:
    return math.log(original_length * frequency[0] / (2 * math.pi * turns)) / step

  first = index(fast)
  last = index(slow)
  if truncate:
    first = math.floor(first)
    last = math.ceil(last)
  first = max(first, 0)
  last = min(last, 2 * n - 1)
  divide = np.clip((np.arange(n) - first) / ((last - first) or 0.001), 0.0, 1.0)
  magnitude = 0.1 * math.log(factor) + 1 if magnitude is None else magnitude
  return frequency * (1 - divide) + frequency / factor * divide, magnitude


def sinusoidal(positions: jax.Array, embed: int, *, base: float = 10_000.0) -> jax.Array:
  """Sinusoidal position vectors (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

  The order of the channels is that of tensor2tensor: sines in the first half, cosines in the second, with
  wavelengths 2 pi to 2 pi base.

  Args:
    positions: [batch, length].
    embed: how many channels.
    base: see above.

  Returns:
    [batch, length, embed], float32.
  """
  frequency = base ** (-np.arange(embed // 2, dtype=np.float32) / max(embed // 2 - 1, 1))
  angle = positions.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def by_place(bias: jax.Array, length: int) -> jax.Array:
  """Turns a bias by distance key - query, [..., 2 length - 1], into one by [..., query, key]."""
  # No gather: all rows are the same with one entry of padding. Read as rows without the padding, each of them
  # starts one entry earlier than the row before.
  bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, 1)])
  rows = jnp.broadcast_to(bias[..., None, :], (*bias.shape[:-1], length, 2 * length))
  flat = rows.reshape(*bias.shape[:-1], -1)[..., : length * (2 * length - 1)]
  return flat.reshape(*bias.shape[:-1], length, -1)[..., length - 1 :]


class RelativePositionBias(nnx.Module):
  """T5's learned bias per head and bucket of distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

  Half of the buckets are single distances; the others grow logarithmically up to `max_distance`. A call with a
  length returns [heads, 2 length - 1]: a bias for every distance key - query from 1 - length on (`by_place`).
  Packed documents are contiguous, so the distance of two tokens of a document is that of their places in the
  row.
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
    self.buckets = buckets
    self.max_distance = max_distance
    self.bidirectional = bidirectional
    self.table = param(rngs, (buckets, heads), (None, 'heads'), normal, kind='table')

  def __call__(self, length: int) -> jax.Array:
    distance = np.arange(1 - length, length)  # key - query
    buckets = self.buckets
    first = np.zeros_like(distance)
    if self.bidirectional:
      buckets //= 2
      first = np.where(distance > 0, buckets, 0)
      distance = np.abs(distance)
    else:
      distance = np.maximum(-distance, 0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(self.max_distance / exact)
    # In float32 like the reference, so that distances at the edge of a bucket round to the same bucket.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = exact + (np.log(ratio) * np.float32(scale)).astype(np.int32)
    index = first + np.where(distance < exact, distance, np.minimum(far, buckets - 1))
    bias = self.table[...].at[index].get(out_sharding=jax.P(None, *_heads_spec(self.table)))
    return bias.T


def _heads_spec(table):
  return (jax.typeof(table[...]).sharding.spec or (None, None))[1:]


class ALiBi(nnx.Module):
  """A fixed bias of -slope x distance per head (Press et al. 2022, arXiv:2108.12409).

  The slopes are the geometric sequence of the paper. If the number of heads is not a power of two, they are
  those of the next lower power, and then every second one of the next higher power, as in the authors' code.
  """

  def __init__(self, *, heads: int, rngs: nnx.Rngs):
    check_sizes(ALiBi, heads=heads)
    self.heads = heads

  def __call__(self, length: int) -> jax.Array:
    distance = np.arange(1 - length, length)  # key - query; later keys are masked
    return jnp.asarray(np.asarray(alibi_slopes(self.heads))[:, None] * distance, jnp.float32)


def alibi_slopes(heads: int) -> list[float]:
  """Returns the slope of every head (see `ALiBi`)."""
  power = 2 ** math.floor(math.log2(heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  extra = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
  return slopes + extra[: heads - power]
