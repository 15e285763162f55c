"""A causal convolution, and scans over chunks, for state-space mixers.

The mixers carry a state along the sequence and reset it at the start of every packed document. The forward pass
stores one state per chunk, and the backward pass computes the states within a chunk again. So memory is linear
in the length, and its largest part is one state per token of a single chunk.

If the mesh splits sequences, the scan works on whole sequences and splits the channels instead, with an
all_to_all before and after (as DeepSpeed-Ulysses does with heads, arXiv:2309.14509). So no device waits for the
state of another.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.kernels.split_sequence import delayed, is_split
from research.model.parameters import normal, param
from research.model.part import Context
from research.parallel.axes import spec_of


def step_bias(smallest: float, largest: float):
  """Returns an initializer: the softplus of the bias is log-uniform in this range (Mamba, section 3.6)."""

  def init(key, shape, dtype, out_sharding):
    low = math.log(smallest)
    high = math.log(largest)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high, out_sharding=out_sharding))
    # The inverse of softplus, in a form that does not overflow.
    return step + jnp.log(-jnp.expm1(-step))

  return init


def log_range(axis: int):
  """Returns an initializer: log(1, 2, ...) along this axis (S4D-real)."""

  def init(key, shape, dtype, out_sharding):
    index = jax.lax.broadcasted_iota(dtype, shape, axis, out_sharding=out_sharding)
    return jnp.log1p(index)

  return init


class CausalConvolution(nnx.Module):
  """y[t] = sum over i of x[t - i] kernel[width - 1 - i] + bias, by channel and within a document."""

  def __init__(self, channels: dict[str, int], *, width: int, bias: bool, rngs: nnx.Rngs):
    shape = (width, *channels.values())
    axes = (None, *channels)
    init = functools.partial(normal, stddev=width**-0.5)
    zeros = nnx.initializers.zeros
    self.kernel = param(rngs, shape, axes, init, kind='matrix')
    self.bias = param(rngs, shape[1:], axes[1:], zeros, kind='vector') if bias else None

  def __call__(self, x: jax.Array, context: Context) -> jax.Array:
    if context.state is None:
      return self.convolve(x, context.segments)
    # In decoding all padding comes before the first token, and must not reach it.
    if context.segments is not None:
      real = context.segments.reshape(*x.shape[:2], *[1] * (x.ndim - 2)) > 0
      x = jnp.where(real, x, 0)
    past = self.kernel.shape[0] - 1

    def after(before):
      y = jnp.concatenate([before, x], axis=1)
      return y[:, x.shape[1] :], self.convolve(y, None)[:, past:]

    shape = (x.shape[0], past, *x.shape[2:])
    return context.carry(after, jnp.zeros(shape, x.dtype, out_sharding=spec_of(x)))

  def convolve(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    length = x.shape[1]
    y = x * kernel[-1]
    for i in range(1, min(kernel.shape[0], length)):
      past = _delay(x, i)
      if segments is not None:
        inside = _delay(segments, i) == segments
        past = jnp.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), past, 0)
      y = y + past * kernel[-1 - i]
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _delay(x: jax.Array, steps: int) -> jax.Array:
  """Shifts x [batch, length, ...] by so many tokens; the first ones are zeros."""
  if is_split(x.shape[1]):
    return delayed(x, steps)
  pad = jnp.pad(x, ((0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)))
  return jax.lax.slice_in_dim(pad, 0, x.shape[1], axis=1)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
  """Cuts [batch, length, ...] into [chunks, batch, chunk, ...], padded with zeros at the end."""
  n = -(-x.shape[1] // chunk)
  x = jnp.pad(x, ((0, 0), (0, n * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
  return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)


def _whole(y: jax.Array, length: int) -> jax.Array:
  """The inverse of `_chunks`."""
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], y.shape[1] * y.shape[2], *y.shape[3:])
  return jax.lax.slice_in_dim(y, 0, length, axis=1)
