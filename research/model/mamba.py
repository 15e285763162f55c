"""Mamba, the selective state-space model: every channel carries a state along the sequence."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.layers import Linear
from research.model.parameters import check_sizes, param
from research.model.part import Context, Cost, Factory
from research.model.recurrence import (
  CausalConvolution,
  _chunks,
  _delay,
  _whole,
  log_range,
  step_bias,
)
from research.parallel.axes import shard, spec


def _token_by_token(a, h, x, step, b, c, first):
  """Computes a chunk of the recurrence, token by token.

  This is for CPUs. Their caches hold the states of one token but not of a whole chunk, and so it is four times
  as fast as `_all_tokens_at_once`.

  Args:
    a: A, [mlp, state], negative.
    h: the state before the chunk, [batch, mlp, state].
    x: [batch, chunk, mlp].
    step: dt, [batch, chunk, mlp].
    b: B, [batch, chunk, state].
    c: C, [batch, chunk, state].
    first: [batch, chunk] bool, the first token of each packed document, which resets the state.

  Returns:
    The state after the chunk, and C h, [batch, chunk, mlp].
  """

  def token(h, inputs):
    x, step, b, c, first = inputs
    decay = jnp.where(first[:, None, None], 0.0, jnp.exp(step[..., None] * a))
    h = decay * h + (step * x)[..., None] * b[:, None]
    return h, jnp.sum(h * c[:, None], axis=-1)

  inputs = tuple(jnp.moveaxis(y, 1, 0) for y in (x, step, b, c, first))
  h, y = jax.lax.scan(token, h, inputs)
  return h, jnp.moveaxis(y, 0, 1)


def _all_tokens_at_once(a, h, x, step, b, c, first):
  """The same by an associative scan: logarithmically many steps, each parallel on an accelerator."""
  decay = jnp.where(first[..., None, None], 0.0, jnp.exp(step[..., None] * a))
  drive = (step * x)[..., None] * b[:, :, None]

  def join(earlier, later):
    return earlier[0] * later[0], earlier[1] * later[0] + later[1]

  decay, states = jax.lax.associative_scan(join, (decay, drive), axis=1)
  states = states + decay * h[:, None]
  return states[:, -1], jnp.einsum('blms,bls->blm', states, c)


class Mamba(nnx.Module):
  """Selective state space (Gu & Dao 2023, arXiv:2312.00752, algorithm 2 and figure 3).

  h[t] = exp(dt A) h[t-1] + dt B x[t];  y[t] = C h[t] + D x[t];  output(y silu(z)), with dt, B, C from x[t].

  Knobs:
    inner: number of channels; None is 2 embed.
    rank: rank of the projection of dt; None is embed / 16, rounded up.
    state: size of the state of each channel.
    width: width of the convolution.
    bias: the projections in and out have biases.
    convolution_bias: the convolution has a bias.
    norm: a norm of dt (before its second projection), B and C (Jamba, arXiv:2403.19887).
    chunk: tokens whose states are in memory at once.
  """

  def __init__(
    self,
    embed: int,
    *,
    inner: int | None = None,
    rank: int | None = None,
    state: int = 16,
    width: int = 4,
    bias: bool = False,
    convolution_bias: bool = True,
    norm: Factory | None = None,
    chunk: int = 64,
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mamba, inner=inner, rank=rank, state=state, width=width, chunk=chunk)
    inner = inner or 2 * embed
    rank = rank or -(-embed // 16)
    self.inner = inner
    self.state = state
    self.width = width
    self.chunk = chunk
    make = functools.partial(linear, rngs=rngs)
    self.input = make({'embed': embed}, {'mlp': inner}, bias=bias)
    self.gate = make({'embed': embed}, {'mlp': inner}, bias=bias)
    self.convolution = CausalConvolution(
      {'mlp': inner}, width=width, bias=convolution_bias, rngs=rngs
    )
    self.step_down = make({'mlp': inner}, {'rank': rank}, bias=False)
    self.b = make({'mlp': inner}, {'state': state}, bias=False)
    self.c = make({'mlp': inner}, {'state': state}, bias=False)
    self.step = make({'rank': rank}, {'mlp': inner}, bias=False, init_scale=1 / 3)
    vector = functools.partial(param, rngs, (inner,), ('mlp',), kind='vector')
    self.step_bias = vector(init=step_bias(1e-3, 1e-1))
    self.log_a = param(rngs, (inner, state), ('mlp', None), log_range(1), kind='vector')
    self.d = vector(init=nnx.initializers.ones)
    self.output = make({'mlp': inner}, {'embed': embed}, bias=bias)
    norms = [norm(size, rngs=rngs) for size in (rank, state, state)] if norm else None
    self.step_norm, self.b_norm, self.c_norm = norms or (None, None, None)

  def __call__(self, x: jax.Array, context: Context):
    gate = self.gate(x)
    x = jax.nn.silu(self.convolution(self.input(x), context))
    step = self.step_down(x)
    b = self.b(x)
    c = self.c(x)
    if self.step_norm is not None:
      step = self.step_norm(step)
      b = self.b_norm(b)
      c = self.c_norm(c)
    # dt and the recurrence are in float32: errors of the decay would grow along the sequence.
    step = jax.nn.softplus(self.step(step).astype(jnp.float32) + self.step_bias[...])
    y = self.scan(x, step, b, c, context)
    y = y + self.d[...].astype(x.dtype) * x
    return self.output(y * jax.nn.silu(gate)), {}

  def scan(self, x, step, b, c, context) -> jax.Array:
    """Runs the recurrence over the whole length, chunk by chunk; returns C h, [batch, length, mlp]."""
    segments = context.segments
    # Stored as a logarithm, so that A stays negative and the state decays.
    a = -jnp.exp(shard(self.log_a[...], 'channels', None))
    x, step = (shard(y, 'batch', None, 'channels') for y in (x, step))
    b, c = (shard(y.astype(jnp.float32), 'batch', None, None) for y in (b, c))
    first = jnp.zeros(x.shape[:2], bool) if segments is None else _delay(segments, 1) != segments
    first = shard(first, 'batch', None)

    def chunk(h, inputs):
      h, y = jax.lax.platform_dependent(
        a, h, *inputs, cpu=_token_by_token, default=_all_tokens_at_once
      )
      return h, y.astype(x.dtype)

    shape = (x.shape[0], self.inner, self.state)
    h = jnp.zeros(shape, jnp.float32, out_sharding=spec('batch', 'channels', None, shape=shape))
    inputs = [_chunks(y, min(self.chunk, x.shape[1])) for y in (x, step, b, c, first)]

    # The backward pass computes the states within a chunk again: only those between chunks are stored.
    def chunks(h):
      return jax.lax.scan(jax.checkpoint(chunk), h, tuple(inputs))

    y = context.carry(chunks, h)
    return shard(_whole(y, x.shape[1]), 'batch', 'length', 'mlp')

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The recurrence: 6 FLOPs per channel and state."""
    flops = 6 * length * self.inner * self.state
    return Cost(full=flops, visible=flops)
