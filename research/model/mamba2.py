"""Mamba-2, state-space duality: a recurrence that is computed by masked products within chunks."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid
from research.model.layers import Linear
from research.model.parameters import check_sizes, param
from research.model.part import Context, Cost, Factory
from research.model.recurrence import CausalConvolution, _chunks, _whole, log_range, step_bias
from research.parallel.axes import shard, spec


def _sums(x: jax.Array, segments: jax.Array) -> jax.Array:
  """Returns cumulative sums of x [batch, length, heads] that restart at every packed document.

  A sum over the whole row, less its value at the start of a document, would round small sums to the size of
  large ones.
  """
  first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))[..., None]
  first = jnp.broadcast_to(first, x.shape, out_sharding=jax.typeof(x).sharding.spec)

  def join(earlier, later):
    return earlier[0] | later[0], later[1] + jnp.where(later[0], 0.0, earlier[1])

  return jax.lax.associative_scan(join, (first, x), axis=1)[1]


class Mamba2(nnx.Module):
  """State-space duality: a scalar A per head (Dao & Gu 2024, arXiv:2405.21060, section 7 and listing 1).

  Within a chunk the recurrence is a masked product of C, B and x, as in attention. A state
  [heads, head_dim, state] carries over from chunk to chunk.

  Knobs:
    heads, head_dim: heads x head_dim is the inner width; None heads makes it 2 embed.
    state: size of the state of each channel.
    groups: the heads of a group share B and C.
    width: width of the convolutions.
    bias: the projections have biases.
    convolution_bias: the convolutions have biases.
    step_limits: the range that the steps dt are clipped to.
    norm_epsilon: epsilon of the gated RMSNorm before the output, over the channels of each group.
    chunk: tokens per chunk.
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
    step_limits: tuple[float, float] | None = None,
    norm_epsilon: float = 1e-5,
    chunk: int = 128,
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mamba2, heads=heads, head_dim=head_dim, state=state, groups=groups, chunk=chunk)
    heads = _number_of_heads(embed, heads, head_dim)
    if heads % groups:
      raise Invalid(Mamba2, 'groups', f'{groups} does not divide the {heads} heads.')
    self.heads = heads
    self.head_dim = head_dim
    self.state = state
    self.groups = groups
    self.width = width
    self.chunk = chunk
    self.epsilon = norm_epsilon
    self.step_limits = step_limits
    channels = {'heads': heads, 'head_dim': head_dim}
    shared = {'groups': groups, 'state': state}
    make = functools.partial(linear, {'embed': embed}, bias=bias, rngs=rngs)
    self.gate = make(channels)
    self.input = make(channels)
    self.b = make(shared)
    self.c = make(shared)
    self.step = make({'heads': heads})
    convolution = functools.partial(
      CausalConvolution, width=width, bias=convolution_bias, rngs=rngs
    )
    self.input_convolution = convolution(channels)
    self.b_convolution = convolution(shared)
    self.c_convolution = convolution(shared)
    ones = nnx.initializers.ones
    vector = functools.partial(param, rngs, (heads,), ('heads',), kind='vector')
    self.step_bias = vector(init=step_bias(1e-3, 1e-1))
    self.log_a = vector(init=log_range(0))
    self.d = vector(init=ones)
    self.norm_scale = param(rngs, (heads, head_dim), ('heads', None), ones, kind='vector')
    self.output = linear(channels, {'embed': embed}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    gate = self.gate(x)
    step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
    if self.step_limits is not None:
      step = jnp.clip(step, *self.step_limits)
    b = jax.nn.silu(self.b_convolution(self.b(x), context))
    c = jax.nn.silu(self.c_convolution(self.c(x), context))
    x = jax.nn.silu(self.input_convolution(self.input(x), context))
    y = self.scan(x, step, b, c, context) + self.d[...].astype(x.dtype)[:, None] * x
    return self.output(self.norm(y, gate)), {}

  def scan(self, x, step, b, c, context) -> jax.Array:
    """Runs the recurrence over the whole length, chunk by chunk; returns C h in the shape of x."""
    segments = context.segments
    # Stored as a logarithm, so that A stays negative and the state decays.
    a = -jnp.exp(shard(self.log_a[...], 'channels'))
    if segments is None:
      segments = jnp.zeros(x.shape[:2], jnp.int32)
    x = shard(x, 'batch', None, 'channels', None)
    step = shard(step, 'batch', None, 'channels')
    b, c = (shard(y, 'batch', None, None, None) for y in (b, c))
    segments = shard(segments, 'batch', None)
    chunk = functools.partial(self.scan_chunk, a)
    shape = (x.shape[0], self.heads, self.head_dim, self.state)
    sharding = spec('batch', 'channels', None, None, shape=shape)
    h = jnp.zeros(shape, jnp.float32, out_sharding=sharding)
    # The padding of the last chunk is 0, so it adds nothing to a state.
    length = min(self.chunk, x.shape[1])
    inputs = [_chunks(y, length) for y in (x, step, b, c, segments)]

    def chunks(h):
      (h, _), y = jax.lax.scan(jax.checkpoint(chunk), (h, segments[:, 0]), tuple(inputs))
      return h, y

    y = context.carry(chunks, h)
    return shard(_whole(y, x.shape[1]), 'batch', 'length', 'heads', None)

  def scan_chunk(self, a, carry, inputs):
    """Computes one chunk of the recurrence (listing 1 of the paper, with packed documents).

    Args:
      a: A, [heads], negative.
      carry: the state before the chunk, [batch, heads, head_dim, state], and the segment of the token before
        it, [batch].
      inputs: x [batch, chunk, heads, head_dim], step [batch, chunk, heads], b and c [batch, chunk, groups,
        state], segments [batch, chunk].

    Returns:
      The carry after the chunk, and C h, [batch, chunk, heads, head_dim].
    """
    h, before = carry
    x, step, b, c, segments = inputs
    # The logarithm of the decay since the chunk began, or the document if that began later.
    total = _sums(step * a, segments)
    last, end = segments[:, -1], total[:, -1]
    drive = x.astype(jnp.float32) * step[..., None]
    b, c = b.astype(jnp.float32), c.astype(jnp.float32)
    # Within the chunk: y[q] = sum over s <= q of (C[q] . B[s]) exp(total[q] - total[s]) drive[s].
    causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    see = causal & (segments[:, :, None] == segments[:, None, :])
    decay = jnp.moveaxis(total[:, :, None] - total[:, None, :], 3, 1)
    # Masked before exp: a hidden difference can be positive, and exp of it infinite, with a NaN gradient.
    decay = jnp.exp(jnp.where(see[:, None], decay, -1e30))
    weights = self.to_heads(jnp.einsum('bqgn,bsgn->bgqs', c, b), 1) * decay
    y = jnp.einsum('bhqs,bshp->bqhp', weights, drive)
    # What the state adds to y, only for tokens of the document that began before the chunk.
    b, c = self.to_heads(b, 2), self.to_heads(c, 2)
    goes_on = (segments == before[:, None])[..., None]
    y = y + jnp.einsum('bqhn,bhpn->bqhp', c * (jnp.exp(total) * goes_on)[..., None], h)
    # The state after the chunk, only from tokens of its last document.
    keep = jnp.exp(end[:, None] - total) * (segments == last[:, None])[..., None]
    h = h * (jnp.exp(end) * (last == before)[:, None])[..., None, None]
    h = h + jnp.einsum('bshp,bshn->bhpn', drive * keep[..., None], b)
    return (h, last), y.astype(x.dtype)

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

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The products within chunks, for all pairs of a chunk, and those with the state."""
    chunk = min(self.chunk, length)
    inner = self.heads * self.head_dim
    pairs = 2 * chunk * (self.groups * self.state + inner)
    flops = length * (pairs + 4 * inner * self.state)
    return Cost(full=flops, visible=flops)


def _number_of_heads(embed: int, heads: int | None, head_dim: int) -> int:
  """Returns `heads`, by default as many as make an inner width of 2 embed."""
  if heads is not None:
    return heads
  if 2 * embed % head_dim:
    raise Invalid(Mamba2, 'head_dim', f'{head_dim} does not divide {2 * embed}, twice the width.')
  return 2 * embed // head_dim
