"""Attention over sequences that are split over devices: keys and values go around a ring.

Ring attention (Liu, Zaharia & Abbeel 2023, arXiv:2310.01889). Every device keeps its queries and their running
softmax in float32, while the keys and values of all devices pass by, one step of the ring at a time. No array
is larger than a block. In the backward pass they go around again, together with their gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from research.model.kernels.chunks import Block, Fused, Pair, Plain
from research.model.kernels.dot_product import grouped, ungrouped
from research.model.kernels.tiled import LANES, is_primal, value_of
from research.parallel.axes import per_device
from research.parallel.mesh import platform


def ring_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  segments: jax.Array | None = None,
  prefix: jax.Array | None = None,
  bias: jax.Array | None = None,
  scale: float,
  soft_cap: float | None = None,
  causal: bool,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attention of sequences to themselves (`dot_product_attention`), their length split over devices.

  In causal attention the first device would have little work and the last one most. So every device takes one
  chunk from the front and one from the back of the sequence (Brandon et al. 2023, arXiv:2311.09431; the order
  is that of Llama 3, arXiv:2407.21783, section 3.3.2), and multiplies two pairs of chunks at every step. The
  chunks are exchanged within this function; outside of it the sequence is in order. A causal window takes only
  as many steps as it reaches back.

  Args:
    query: [batch, length, heads, head_dim].
    key, value: [batch, length, kv_heads, head_dim].
    segments: [batch, length]; a segment sees only itself.
    prefix: bool, [batch, length]; two tokens of a prefix see each other in spite of `causal`.
    bias: [heads, 2 length - 1]: entry length - 1 + d is added to the logits of keys d places after the query.
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c).
    causal: no token sees a later one.
    window: no token sees one that is `window` or more places away.
    interpret: runs the kernel for TPUs, in Python, for tests.

  Returns:
    [batch, length, heads, head_dim of value]. A query that sees no key (padding) gets zeros.
  """
  length, kv_heads = query.shape[1], key.shape[2]
  query, sharding = grouped(query, kv_heads)
  axis = sharding[1]
  keys = jax.P(*sharding[:3], None)
  rows = jax.P(*sharding[:2])
  key, value = (jax.sharding.reshard(x, keys) for x in (key, value))
  by_distance = jax.P(sharding[2], None, None)
  if bias is not None:
    bias = bias.reshape(kv_heads, -1, bias.shape[1], out_sharding=by_distance)
  make = functools.partial(
    _product, causal=causal, window=window, scale=scale, soft_cap=soft_cap, interpret=interpret
  )
  ring = _Ring.over(axis, length, causal, prefix is not None, window, make)
  in_specs = (sharding, keys, keys, rows, rows, by_distance)
  run = per_device(ring.device, in_specs=in_specs, out_specs=sharding)
  return ungrouped(run(query, key, value, segments, prefix, bias))


@dataclasses.dataclass(frozen=True)
class _Ring:
  """The static side of one attention: the ring, and the product of two chunks.

  Every device has one chunk, or two if `balanced`: device p those with the numbers p and 2 devices - 1 - p.
  """

  axis: str
  devices: int
  balanced: bool
  steps: int
  product: Plain

  @classmethod
  def over(cls, axis, length, causal, prefix, window, make):
    devices = jax.sharding.get_abstract_mesh().shape[axis]
    balanced = causal and not prefix and window is None and length % (2 * devices) == 0
    chunk = length // (devices * (2 if balanced else 1))
    # Without a prefix, a causal window never reaches the devices beyond the one where it begins.
    short = causal and not prefix and window is not None
    steps = min(devices, 1 - (1 - window) // chunk) if short else devices
    return cls(axis, devices, balanced, steps, make(chunk))

  def device(self, query, key, value, segments, prefix, bias):
    """What every device computes, with its own part of the length."""
    heads = query.shape[2:4]
    query, key, value, *rows = (self.take(x) for x in (query, key, value, segments, prefix))
    query, key, value = self.product.enter(query, key, value)
    y = self.product.leave(_attend(self, query, Block(key, value, *rows), bias))
    return self.give(y.reshape(*y.shape[:3], *heads, y.shape[-1]))

  # In order, device p has the chunks 2 p and 2 p + 1. `take` exchanges them for those that it works on.

  def take(self, x):
    """Turns the tokens of a device, [batch, tokens, ...], into its chunks, [chunks, batch, chunk, ...]."""
    if x is None or not self.balanced:
      return x if x is None else x[None]
    halves = zip(jnp.split(x, 2, axis=1), self._routes(), strict=True)
    even, odd = (jax.lax.ppermute(y, self.axis, to) for y, to in halves)
    turned = jax.lax.axis_index(self.axis) % 2 == 1
    return jnp.stack([jnp.where(turned, odd, even), jnp.where(turned, even, odd)])

  def give(self, y):
    """The inverse of `take`."""
    if not self.balanced:
      return y[0]
    turned = jax.lax.axis_index(self.axis) % 2 == 1
    pair = jnp.where(turned, y[1], y[0]), jnp.where(turned, y[0], y[1])
    back = ([(to, source) for source, to in route] for route in self._routes())
    halves = [jax.lax.ppermute(y, self.axis, to) for y, to in zip(pair, back, strict=True)]
    return jnp.concatenate(halves, axis=1)

  def _routes(self):
    """Returns (source, target) of all devices, for the first and for the second chunk of each in order."""

    def target(chunk):
      return min(chunk, 2 * self.devices - 1 - chunk)

    return [[(p, target(2 * p + half)) for p in range(self.devices)] for half in (0, 1)]

  def number(self, device, slot):
    """Returns the place in the sequence of a device's chunk."""
    return jnp.where(slot == 0, device, 2 * self.devices - 1 - device)

  def pairs(self, rank, source, first: bool):
    """Returns which chunks of queries device `rank` multiplies with which chunks of keys of device `source`."""
    if not self.balanced:
      return [(0, 0)]
    if first:
      return [(0, 0), (1, 0), (1, 1)]
    # Both of our chunks see the front chunk of an earlier device. Only our back chunk sees those of a later
    # device, and it sees both. No other pair has anything visible, so all devices have two pairs.
    both = jnp.where(source < rank, 0, 1)
    return [(1, 0), (both, both)]

  def turn(self, tree, back: int | None = None):
    """Sends every array to the next device, or `back` by so many devices."""
    shift = 1 if back is None else -back
    to = [(p, (p + shift) % self.devices) for p in range(self.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, to), tree)

  def around(self, visit, carry, block):
    """Calls `visit(carry, block, source, first)` with every device's block.

    The second half of the carry travels with the block, and comes back to the block's device at the end.
    """
    rank = jax.lax.axis_index(self.axis)
    carry, travelling = visit(carry, block, rank, True)

    def step(state, i):
      carry, (block, travelling) = state[0], self.turn(state[1])
      carry, travelling = visit((carry, travelling), block, (rank - i) % self.devices, False)
      return (carry, (block, travelling)), None

    state = (carry, (block, travelling))
    (carry, (_, travelling)), _ = jax.lax.scan(step, state, jnp.arange(1, self.steps))
    return carry, self.turn(travelling, back=self.steps - 1)


def _product(chunk: int, *, interpret: bool, **knobs) -> Plain:
  """Returns the product of two chunks for the devices in use."""
  if interpret or (platform() == 'tpu' and chunk % LANES == 0):
    return Fused(chunk, interpret=interpret, **knobs)
  return Plain(chunk, **knobs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, query, block, bias):
  """Attention of this device's queries to all keys, [chunks, batch, chunk, kv_heads, group, head_dim]."""
  return _around(ring, query, block, bias)[0]


def _forward(ring, query, block, bias):
  learns = bias is not None and bias.perturbed
  query, block, bias = jax.tree.map(value_of, (query, block, bias), is_leaf=is_primal)
  y, log_total = _around(ring, query, block, bias)
  # A residual is an array, so whether the bias learns is said by the tree: () or None.
  return y, (query, block, bias, y, log_total, () if learns else None)


def _around(ring, query, block, bias):
  rank = jax.lax.axis_index(ring.axis)

  def visit(carry, passing, source, first):
    sums, _ = carry
    for i, j in ring.pairs(rank, source, first):
      pair = Pair(i, j, ring.number(rank, i), ring.number(source, j))
      sums = ring.product.forward(sums, query, block, passing, pair, bias)
    return sums, ()

  sums, _ = ring.around(visit, (ring.product.start(query, block.value), ()), block)
  return ring.product.finish(sums, block.value.dtype)


def _backward(ring, residuals, dy):
  query, block, bias, y, log_total, learns = residuals
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    dy = jnp.zeros(y.shape, y.dtype)
  rank = jax.lax.axis_index(ring.axis)
  saved = ring.product.saved(dy, y, log_total)

  def visit(carry, passing, source, first):
    (dq, d_bias), (dk, dv) = carry
    for i, j in ring.pairs(rank, source, first):
      pair = Pair(i, j, ring.number(rank, i), ring.number(source, j))
      (dq, dk, dv), of_bias = ring.product.backward(
        (dq, dk, dv), query, block, passing, pair, bias, saved, learns is not None
      )
      d_bias = None if bias is None else d_bias + of_bias
    return (dq, d_bias), (dk, dv)

  # Gradients are summed in float32 while they go around.
  def zeros(x):
    return jnp.zeros(x.shape, jnp.float32)

  d_bias = None if bias is None else zeros(bias)
  carry = ((zeros(query), d_bias), (zeros(block.key), zeros(block.value)))
  (dq, d_bias), (dk, dv) = ring.around(visit, carry, block)
  d_block = Block(dk.astype(block.key.dtype), dv.astype(block.value.dtype), None, None)
  return dq.astype(query.dtype), d_block, None if bias is None else d_bias.astype(bias.dtype)


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
