"""State-space mixers, scanned in chunks.

Both carry a state along the sequence and forget it where a packed document begins. Of the states inside a
chunk none outlives its chunk: the forward pass keeps one state per chunk, the backward pass computes the rest
again, so memory is linear in length with one state per token of a single chunk as its largest piece.

Where the mesh splits sequences over devices, the scan alone has them whole and splits the channels instead: an
all_to_all there and one back (as DeepSpeed-Ulysses does with heads, arXiv:2309.14509), and no device waits for
the state of another.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research.errors import Invalid
from research.model.layers import Context, Linear, Part, check_sizes, normal, param
from research.model.ring import delayed, is_split
from research.sharding import shard, spec


def step_bias(smallest: float, largest: float):
  """Initialiser: the softplus of the bias is log-uniform between these step sizes (Mamba, section 3.6)."""

  def init(key, shape, dtype, out_sharding):
    low, high = math.log(smallest), math.log(largest)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high, out_sharding=out_sharding))
    return step + jnp.log(-jnp.expm1(-step))

  return init


def log_range(axis: int):
  """Initialiser: log(1, 2, ...) along this axis (S4D-real)."""

  def init(key, shape, dtype, out_sharding):
    index = jax.lax.broadcasted_iota(dtype, shape, axis, out_sharding=out_sharding)
    return jnp.log1p(index)

  return init


class CausalConvolution(nnx.Module):
  """y[t] = sum over i of x[t - i] kernel[width - 1 - i] + bias, each channel for itself and its document."""

  def __init__(self, channels: dict[str, int], *, width: int, bias: bool, rngs: nnx.Rngs):
    shape, axes = (width, *channels.values()), (None, *channels)
    self.kernel = param(rngs, shape, axes, functools.partial(normal, stddev=width**-0.5))
    self.bias = param(rngs, shape[1:], axes[1:], nnx.initializers.zeros) if bias else None

  def __call__(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
    kernel, length = self.kernel[...].astype(x.dtype), x.shape[1]
    y = x * kernel[-1]
    for i in range(1, min(kernel.shape[0], length)):
      past = _delay(x, i)
      if segments is not None:
        same = _delay(segments, i) == segments
        past = jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), past, 0)
      y = y + past * kernel[-1 - i]
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _delay(x: jax.Array, steps: int) -> jax.Array:
  if is_split(x.shape[1]):
    return delayed(x, steps)
  pad = jnp.pad(x, ((0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)))
  return jax.lax.slice_in_dim(pad, 0, x.shape[1], axis=1)


def _sums(x: jax.Array, segments: jax.Array) -> jax.Array:
  """Cumulative sums [batch, length, heads] that begin anew in every document, so that none rounds another."""
  first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))[..., None]
  first = jnp.broadcast_to(first, x.shape, out_sharding=jax.typeof(x).sharding.spec)

  def join(left, right):
    return left[0] | right[0], right[1] + jnp.where(right[0], 0.0, left[1])

  return jax.lax.associative_scan(join, (first, x), axis=1)[1]


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
  """[batch, length, ...] to [chunks, batch, chunk, ...], with zeros behind."""
  n = -(-x.shape[1] // chunk)
  x = jnp.pad(x, ((0, 0), (0, n * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
  return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)


def _whole(y: jax.Array, length: int) -> jax.Array:
  """The inverse of `_chunks`."""
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], y.shape[1] * y.shape[2], *y.shape[3:])
  return jax.lax.slice_in_dim(y, 0, length, axis=1)


def _token_by_token(a, h, x, step, b, c, first):
  """A chunk of Mamba's recurrence: the last state [batch, mlp, state], and C h [batch, chunk, mlp].

  A CPU's caches hold the states of one token, not those of a chunk: four times as fast as all at once there.
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
  """The same by an associative scan: logarithmically few steps, for chips with work for every one of them."""
  decay = jnp.where(first[..., None, None], 0.0, jnp.exp(step[..., None] * a))
  drive = (step * x)[..., None] * b[:, :, None]
  join = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
  decay, states = jax.lax.associative_scan(join, (decay, drive), axis=1)
  states = states + decay * h[:, None]
  return states[:, -1], jnp.einsum('blms,bls->blm', states, c)


class Mamba(nnx.Module):
  """Selective state space (Gu & Dao 2023, arXiv:2312.00752, algorithm 2 and figure 3).

  h[t] = exp(dt A) h[t-1] + dt B x[t];  y[t] = C h[t] + D x[t];  output(y silu(z)), with dt, B, C from x[t].

  Knobs:
    inner: channels, 2 embed by default; state: of each channel.
    rank: of dt's projection, embed / 16 by default, rounded up.
    width: of the convolution; bias: of the projections in and out.
    norm: of dt (before its second projection), B and C (Jamba, arXiv:2403.19887).
    chunk: tokens whose states are held at once.
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
    norm: Part | None = None,
    chunk: int = 64,
    linear: Part = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mamba, inner=inner, rank=rank, state=state, width=width, chunk=chunk)
    inner, rank = inner or 2 * embed, rank or -(-embed // 16)
    self.inner, self.state, self.width, self.chunk = inner, state, width, chunk
    make = lambda inputs, outputs, bias=False, **knobs: linear(
      inputs, outputs, bias=bias, rngs=rngs, **knobs
    )
    self.input, self.gate = (make({'embed': embed}, {'mlp': inner}, bias) for _ in range(2))
    self.convolution = CausalConvolution(
      {'mlp': inner}, width=width, bias=convolution_bias, rngs=rngs
    )
    self.step_down = make({'mlp': inner}, {'rank': rank})
    self.b, self.c = (make({'mlp': inner}, {'state': state}) for _ in range(2))
    self.step = make({'rank': rank}, {'mlp': inner}, init_scale=1 / 3)
    self.step_bias = param(rngs, (inner,), ('mlp',), step_bias(1e-3, 1e-1))
    self.log_a = param(rngs, (inner, state), ('mlp', None), log_range(1))
    self.d = param(rngs, (inner,), ('mlp',), nnx.initializers.ones)
    self.output = make({'mlp': inner}, {'embed': embed}, bias)
    norms = [norm(size, rngs=rngs) for size in (rank, state, state)] if norm else None
    self.step_norm, self.b_norm, self.c_norm = norms or (None, None, None)

  def __call__(self, x: jax.Array, context: Context):
    gate = self.gate(x)
    x = jax.nn.silu(self.convolution(self.input(x), context.segments))
    step, b, c = self.step_down(x), self.b(x), self.c(x)
    if self.step_norm is not None:
      step, b, c = self.step_norm(step), self.b_norm(b), self.c_norm(c)
    step = jax.nn.softplus(self.step(step).astype(jnp.float32) + self.step_bias[...])
    y = self.scan(x, step, b, c, context.segments)
    y = y + self.d[...].astype(x.dtype) * x
    return self.output(y * jax.nn.silu(gate)), {}

  def scan(self, x, step, b, c, segments) -> jax.Array:
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
    _, y = jax.lax.scan(jax.checkpoint(chunk), h, tuple(inputs))
    return shard(_whole(y, x.shape[1]), 'batch', 'length', 'mlp')

  def mixing_flops(self, length: int, encoder_length: int) -> int:
    """Forward FLOPs of the recurrence: 6 per channel and state."""
    return 6 * length * self.inner * self.state


class Mamba2(nnx.Module):
  """State-space duality: a scalar A per head (Dao & Gu 2024, arXiv:2405.21060, section 7 and listing 1).

  Inside a chunk the recurrence is a masked product of C, B and x, as in attention; between chunks a state
  [heads, head_dim, state] is carried.

  Knobs:
    heads, head_dim: heads x head_dim is the inner width, 2 embed by default.
    state: of each channel; groups: heads of one group share B and C.
    norm_epsilon: of the gated RMSNorm before the output, which is over each group's channels.
  """

  def __init__(
    self,
    embed: int,
    *,
    head_dim: int,
    heads: int | None = None,
    state: int = 128,
    groups: int = 1,
    width: int = 4,
    bias: bool = False,
    convolution_bias: bool = True,
    norm_epsilon: float = 1e-5,
    chunk: int = 128,
    linear: Part = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mamba2, heads=heads, head_dim=head_dim, state=state, groups=groups, chunk=chunk)
    if heads is None:
      if 2 * embed % head_dim:
        raise Invalid(
          Mamba2, 'head_dim', f'{head_dim} does not divide {2 * embed}, twice the width.'
        )
      heads = 2 * embed // head_dim
    if heads % groups:
      raise Invalid(Mamba2, 'groups', f'{groups} does not divide the {heads} heads.')
    self.heads, self.head_dim, self.state, self.groups = heads, head_dim, state, groups
    self.width, self.chunk, self.epsilon = width, chunk, norm_epsilon
    channels, shared = (
      {'heads': heads, 'head_dim': head_dim},
      {'groups': groups, 'state': state},
    )
    make = lambda outputs: linear({'embed': embed}, outputs, bias=bias, rngs=rngs)
    self.gate, self.input, self.b, self.c = map(make, (channels, channels, shared, shared))
    self.step = make({'heads': heads})
    convolve = lambda axes: CausalConvolution(axes, width=width, bias=convolution_bias, rngs=rngs)
    self.input_convolution, self.b_convolution, self.c_convolution = map(
      convolve, (channels, shared, shared)
    )
    self.step_bias = param(rngs, (heads,), ('heads',), step_bias(1e-3, 1e-1))
    self.log_a = param(rngs, (heads,), ('heads',), log_range(0))
    self.d = param(rngs, (heads,), ('heads',), nnx.initializers.ones)
    shape = (heads, head_dim)
    self.norm_scale = param(rngs, shape, ('heads', None), nnx.initializers.ones)
    self.output = linear(channels, {'embed': embed}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    segments, gate = context.segments, self.gate(x)
    step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
    b = jax.nn.silu(self.b_convolution(self.b(x), segments))
    c = jax.nn.silu(self.c_convolution(self.c(x), segments))
    x = jax.nn.silu(self.input_convolution(self.input(x), segments))
    y = self.scan(x, step, b, c, segments) + self.d[...].astype(x.dtype)[:, None] * x
    return self.output(self.norm(y, gate)), {}

  def scan(self, x, step, b, c, segments) -> jax.Array:
    a = -jnp.exp(shard(self.log_a[...], 'channels'))
    if segments is None:
      segments = jnp.zeros(x.shape[:2], jnp.int32)
    x, step = shard(x, 'batch', None, 'channels', None), shard(step, 'batch', None, 'channels')
    b, c = (shard(y, 'batch', None, None, None) for y in (b, c))
    segments = shard(segments, 'batch', None)

    def chunk(carry, inputs):
      h, before = carry
      x, step, b, c, segments = inputs
      total = _sums(
        step * a, segments
      )  # the log of the decay since the chunk, or the document, began
      last, end = segments[:, -1], total[:, -1]
      drive = x.astype(jnp.float32) * step[..., None]
      b, c = b.astype(jnp.float32), c.astype(jnp.float32)
      # Inside the chunk: y[q] = sum over s <= q of (C[q] . B[s]) exp(total[q] - total[s]) drive[s].
      causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
      see = causal & (segments[:, :, None] == segments[:, None, :])
      decay = jnp.moveaxis(total[:, :, None] - total[:, None, :], 3, 1)
      decay = jnp.exp(jnp.where(see[:, None], decay, -1e30))
      weights = self.to_heads(jnp.einsum('bqgn,bsgn->bgqs', c, b), 1) * decay
      y = jnp.einsum('bhqs,bshp->bqhp', weights, drive)
      # From before it, and on to the next: only for the document that goes on.
      b, c = self.to_heads(b, 2), self.to_heads(c, 2)
      goes_on = (segments == before[:, None])[..., None]
      y = y + jnp.einsum('bqhn,bhpn->bqhp', c * (jnp.exp(total) * goes_on)[..., None], h)
      keep = jnp.exp(end[:, None] - total) * (segments == last[:, None])[..., None]
      h = h * (jnp.exp(end) * (last == before)[:, None])[..., None, None]
      h = h + jnp.einsum('bshp,bshn->bhpn', drive * keep[..., None], b)
      return (h, last), y.astype(x.dtype)

    shape = (x.shape[0], self.heads, self.head_dim, self.state)
    where = spec('batch', 'channels', None, None, shape=shape)
    h = jnp.zeros(shape, jnp.float32, out_sharding=where)
    # Padding behind belongs to the last document and drives nothing.
    length = min(self.chunk, x.shape[1])
    inputs = [_chunks(y, length) for y in (x, step, b, c, segments)]
    _, y = jax.lax.scan(jax.checkpoint(chunk), (h, segments[:, 0]), tuple(inputs))
    return shard(_whole(y, x.shape[1]), 'batch', 'length', 'heads', None)

  def to_heads(self, y: jax.Array, axis: int) -> jax.Array:
    """Repeats the axis of groups to heads."""
    y = jnp.repeat(y, self.heads // self.groups, axis=axis)
    names = ['batch', None, None, None]
    names[axis] = 'channels'
    return shard(y, *names)

  def norm(self, y: jax.Array, gate: jax.Array) -> jax.Array:
    """RMSNorm of y silu(gate) over the channels of each group."""
    dtype = y.dtype
    y = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    square = shard(jnp.mean(y * y, axis=-1), 'batch', 'length', None)
    square = jnp.mean(square.reshape(*square.shape[:2], self.groups, -1), axis=-1)
    square = jnp.repeat(square, self.heads // self.groups, axis=-1)
    square = shard(square, 'batch', 'length', 'heads')[..., None]
    return (y * jax.lax.rsqrt(square + self.epsilon) * self.norm_scale[...]).astype(dtype)

  def mixing_flops(self, length: int, encoder_length: int) -> int:
    """Forward FLOPs of the chunked products, every pair of a chunk counted."""
    chunk, inner = min(self.chunk, length), self.heads * self.head_dim
    pairs = 2 * chunk * (self.groups * self.state + inner)
    return length * (pairs + 4 * inner * self.state)
