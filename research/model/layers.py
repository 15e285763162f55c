"""Projections and norms, the layers inside parts.

They compute in the dtype of the activations. Parameters are float32, and are cast where they are used.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.parameters import Initializer, _whole, normal, param
from research.model.part import Factory
from research.model.weights import Matrix, make_weight, multiply
from research.parallel.axes import shard


class Linear(nnx.Module):
  """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] (+ bias[outputs]).

  Args:
    inputs: names and sizes of the input axes; there may be several, as in {'heads': 8, 'head_dim': 64}.
    outputs: names and sizes of the output axes.

  Knobs:
    bias: adds a bias.
    init: initializer of the kernel; None is normal with variance init_scale / fan_in.
    init_scale: see `init`.
    weight: makes the kernel (see `weights`); None takes the model's choice.
  """

  def __init__(
    self,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    bias: bool = False,
    init: Initializer | None = None,
    init_scale: float = 1.0,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    self.inputs = tuple(inputs)
    self.outputs = tuple(outputs)
    fan_in = math.prod(inputs.values())
    init = init or functools.partial(normal, stddev=math.sqrt(init_scale / fan_in))
    shape = (*inputs.values(), *outputs.values())
    kernel = Matrix(shape, (*inputs, *outputs), init, inputs=len(inputs))
    self.kernel = make_weight(kernel, weight, rngs=rngs)
    shape = tuple(outputs.values())
    zeros = nnx.initializers.zeros
    self.bias = param(rngs, shape, self.outputs, zeros, kind='vector') if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    n = len(self.inputs)
    to = (*('batch', 'length', *[None] * 8)[: x.ndim - n], *_whole(self.outputs))
    y = multiply(x, self.kernel, (*self.inputs, *self.outputs), to, contract=n)
    # Back in the residual stream, whose length is split as 'sequence' (sequence parallelism).
    if self.outputs == ('embed',):
      y = shard(y, 'batch', 'sequence', None)
    if self.bias is None:
      return y
    return y + shard(self.bias[...].astype(x.dtype), *_whole(self.outputs))


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale (Zhang & Sennrich 2019, arXiv:1910.07467), in float32.

  With `scale_offset` 1 the parameter is the difference of the scale from one (Gemma).
  """

  def __init__(
    self, embed: int, *, epsilon: float = 1e-6, scale_offset: float = 0.0, rngs: nnx.Rngs
  ):
    self.epsilon = epsilon
    self.scale_offset = scale_offset
    init = nnx.initializers.constant(1.0 - scale_offset)
    self.scale = param(rngs, (embed,), (None,), init, kind='vector')

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return (y * (self.scale[...] + self.scale_offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016, arXiv:1607.06450), in float32."""

  def __init__(
    self,
    embed: int,
    *,
    epsilon: float = 1e-5,
    scale: bool = True,
    bias: bool = True,
    rngs: nnx.Rngs,
  ):
    self.epsilon = epsilon
    vector = functools.partial(param, rngs, (embed,), (None,), kind='vector')
    self.scale = vector(init=nnx.initializers.ones) if scale else None
    self.bias = vector(init=nnx.initializers.zeros) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    if self.scale is not None:
      y = y * self.scale[...]
    if self.bias is not None:
      y = y + self.bias[...]
    return y.astype(x.dtype)
