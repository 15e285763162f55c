"""The experts of a mixture: their stacked matrices, and the routing of tokens to them.

The `active` choices of every token become rows of one buffer, ordered by expert. Without a capacity an expert
has as many rows as tokens chose it, rounded up to a block (dropless: Gale et al. 2022, arXiv:2211.15841). With
a capacity it has a fixed number of rows per sequence, and choices beyond it are dropped (Lepikhin et al. 2020,
arXiv:2006.16668). Gathers move tokens in both directions, so neither pass scatters. If experts and tokens are
on different devices, an all_to_all moves the rows to the experts and back.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.expert_rows import (
  capacity_rows,
  dropless_rows,
  permute,
  rank_in_group,
  weigh,
)
from research.model.parameters import normal
from research.model.part import Factory
from research.model.weights import Matrix, make_weight
from research.parallel.axes import per_device, shard, spec
from research.parallel.mesh import as_tuple, platform

# Decoding on an accelerator multiplies so many tokens with all experts. Reading a matrix of bfloat16 takes as
# long as multiplying it with 166 (TPU v5p) to 295 (H100) rows.
FEW_TOKENS = 128


class Experts(nnx.Module):
  """`experts` MLPs with stacked matrices, [expert, embed, mlp] and [expert, mlp, embed].

  Knobs:
    active: experts per token.
    mlp: width of every expert.
    activations: as in `mlp.Mlp`.
    capacity: as in `moe.MoE`; None is dropless.
    places: as in `moe.MoE`.
    weight: makes the matrices (see `weights`); None takes the model's choice.
  """

  def __init__(
    self,
    embed: int,
    experts: int,
    *,
    active: int,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    capacity: float | None,
    places: int | None = None,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    self.experts = experts
    self.active = active
    self.places = places
    # A number of places limits experts like a capacity does. With either, sequences stay whole on a device.
    self.capacity = 1.0 if capacity is None and places is not None else capacity
    self.activations = tuple(activations)

    def matrices(ins: dict, outs: dict):
      axes = ('expert', *ins, *outs)
      shape = (experts, *ins.values(), *outs.values())
      init = functools.partial(normal, stddev=math.prod(ins.values()) ** -0.5)
      matrix = Matrix(shape, axes, init, stacked=1, active=active / experts)
      return make_weight(matrix, weight, rngs=rngs)

    self.inputs = nnx.List([matrices({'embed': embed}, {'mlp': mlp}) for _ in self.activations])
    self.output = matrices({'mlp': mlp}, {'embed': embed})

  def __call__(
    self, x: jax.Array, weights: jax.Array, index: jax.Array, *, dropless: bool = False
  ) -> jax.Array:
    """Returns the sum over a token's choices of weight x expert(x), [batch, length, embed].

    Args:
      x: [batch, length, embed].
      weights: [batch, length, active].
      index: [batch, length, active], the chosen experts; the index `experts` chooses none.
      dropless: for decoding. It ignores the capacity, because there is no whole sequence over which one is
        defined; and few tokens may go through all experts (`all_experts`).
    """
    axes = ('expert', None, 'mlp')
    capacity = None if dropless else self.capacity
    inputs = [shard(w[...].astype(x.dtype), *axes) for w in self.inputs]
    output = shard(self.output[...].astype(x.dtype), 'expert', 'mlp', None)
    if jax.sharding.get_abstract_mesh().empty:
      return self.compute(x, weights, index, inputs, output, capacity, decoding=dropless)
    # With a capacity a token's row depends on the tokens before it, so sequences stay whole.
    tokens = ('batch', 'length' if capacity is None else None, None)
    token_spec = spec(*tokens, shape=x.shape)
    input_spec = spec(*axes, shape=inputs[0].shape)
    output_spec = jax.P(input_spec[0], input_spec[2], None)
    token_axes = {name for axis in token_spec for name in as_tuple(axis)}
    # Some of the mesh axes that split experts split tokens too: along these `peers`, tokens are sent to their
    # experts. Along the others, `copies`, devices have the same tokens, and each computes its own experts (or
    # its own columns of all experts).
    peers = tuple(name for name in as_tuple(input_spec[0]) if name in token_axes)
    copies = tuple(name for name in as_tuple(input_spec[0]) if name not in token_axes)
    split = (*copies, *as_tuple(input_spec[2]))

    def local(x, weights, index, inputs, output):
      index = _among(index, output.shape[0], peers, copies)
      send = self.in_rounds if peers and capacity is None else self.compute
      y = send(x, weights, index, inputs, output, capacity, peers, decoding=dropless)
      return jax.lax.psum(y, split) if split else y

    x, weights, index = (shard(y, *tokens) for y in (x, weights, index))
    in_specs = (token_spec, token_spec, token_spec, [input_spec] * len(inputs), output_spec)
    mapped = per_device(local, in_specs=in_specs, out_specs=token_spec)
    return shard(mapped(x, weights, index, inputs, output), 'batch', 'sequence', None)

  def compute(self, x, weights, index, inputs, output, capacity, peers=(), decoding=False):
    """Returns the sum over the choices of experts on this device; with a capacity, of experts of all peers."""
    if decoding and _few(x):
      return self.all_experts(x, weights, index, inputs, output)
    experts = output.shape[0]
    n = _size(peers)
    if capacity is None:
      row, rows, matmul = dropless_rows(index, experts)
    else:
      row, rows, matmul = capacity_rows(index, experts * n, self.experts, capacity, self.places)
    count = row.size
    active = row.shape[-1]
    row = row.reshape(count)
    # `row` maps choices to rows, `source` rows to choices: with both, the gradient of a gather is a gather.
    source = jnp.full(rows, count).at[row].set(jnp.arange(count), mode='drop')
    tokens = jnp.repeat(x.reshape(count // active, -1), active, axis=0)
    tokens = _exchange(permute(tokens, source, row), experts, peers)
    hidden = (f(matmul(tokens, w)) for f, w in zip(self.activations, inputs, strict=True))
    y = matmul(functools.reduce(jnp.multiply, hidden), output)
    y = permute(_exchange(y, experts, peers, back=True), row, source)
    return weigh(y, weights).reshape(x.shape)

  def all_experts(self, x, weights, index, inputs, output):
    """Returns the same sum as `compute` without a capacity; every expert on this device reads every token.

    The kernels of grouped products need one layer's matrices as an array of their own. In decoding XLA would
    copy them out of the stack of all layers, which takes longer than these products: they read the stack.
    """
    experts = output.shape[0]
    tokens = x.reshape(1, -1, x.shape[-1])
    tokens = jnp.broadcast_to(tokens, (experts, *tokens.shape[1:]))
    hidden = (
      f(jnp.einsum('xne,xem->xnm', tokens, w))
      for f, w in zip(self.activations, inputs, strict=True)
    )
    y = jnp.einsum('xnm,xme->xne', functools.reduce(jnp.multiply, hidden), output)
    # [tokens, choices, experts]: a choice of none, or of an expert elsewhere, is no expert's.
    chosen = index.reshape(-1, index.shape[-1], 1) == jnp.arange(experts)
    weights = weights.reshape(-1, weights.shape[-1], 1)
    by_expert = jnp.sum(jnp.where(chosen, weights, 0.0), axis=1)
    y = jnp.where(chosen.any(axis=1).T[..., None], y, 0.0)
    return jnp.einsum('xne,nx->ne', y, by_expert.astype(y.dtype)).reshape(x.shape)

  def all_tokens(self, x, weights, index, inputs, output, peers):
    """Returns the same sum as `in_rounds`; every device's experts read the tokens of all peers."""
    experts = output.shape[0]
    x, weights, index = (jax.lax.all_gather(y, peers, tiled=True) for y in (x, weights, index))
    index = index - jax.lax.axis_index(peers) * experts
    index = jnp.where((index >= 0) & (index < experts), index, experts)
    y = self.all_experts(x, weights, index, inputs, output)
    return jax.lax.psum_scatter(y, peers, tiled=True)

  def in_rounds(self, x, weights, index, inputs, output, capacity, peers, decoding=False):
    """Sends every choice to the peer that has its expert, and the result back. Drops no choice.

    Arrays must have the same size on all devices, so in a round each device sends `room` rows to each peer,
    1.25 times an equal share. There are as many rounds as the fullest peer needs: one if experts are balanced.
    """
    experts = output.shape[0]
    n = _size(peers)
    if decoding and _few(x, n):
      return self.all_tokens(x, weights, index, inputs, output, peers)
    flat = index.reshape(-1)
    active = index.shape[-1]
    count = flat.size
    tokens = count // active
    peer = flat // experts  # n for a choice of no expert
    rank, sizes = rank_in_group(peer, n)
    room = min(8 * math.ceil(1.25 * count / n / 8), tokens * min(active, experts))

    def send(first, choices, operands):
      flat, peer, rank = choices
      x, weights, inputs, output = operands
      place = rank - first
      row = jnp.where((peer < n) & (place >= 0) & (place < room), peer * room + place, n * room)
      source = jnp.full(n * room, count).at[row].set(jnp.arange(count), mode='drop')
      expert = (flat % experts).at[source].get(mode='fill', fill_value=experts)

      def swap(y):
        return jax.lax.all_to_all(y, peers, 0, 0, tiled=True)

      rows = jnp.repeat(x.reshape(tokens, -1), active, axis=0)
      rows = swap(permute(rows, source, row))
      expert = swap(expert)
      ones = jnp.ones((1, n * room, 1), weights.dtype)
      choice = expert[None, :, None]
      y = self.compute(rows[None], ones, choice, inputs, output, None, decoding=decoding)
      return weigh(permute(swap(y[0]), row, source), weights)

    # All devices must do the same number of rounds, because a collective waits for every device.
    largest = jax.lax.pmax(jnp.max(sizes), tuple(jax.sharding.get_abstract_mesh().manual_axes))
    y = _sum_of_rounds(send, room, largest, (flat, peer, rank), (x, weights, inputs, output))
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_rounds(f, step: int, end: jax.Array, integers, operands):
  """Returns the sum of f(i, integers, operands) over i = 0, step, ... < `end`.

  jax cannot differentiate a loop whose length is known only at run time. Here the gradient computes every f
  again.
  """
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, 0, integers, operands))

  def add(state):
    i, total = state
    return i + step, total + f(i, integers, operands)

  return _loop_until(end, add, zero)


def _loop_until(end, add, zero):
  """Repeats (i, total) = add((i, total)) from (0, zero) while i < end; returns the total."""

  def unfinished(state):
    return state[0] < end

  return jax.lax.while_loop(unfinished, add, (0, zero))[1]


def _sum_forward(f, step, end, integers, operands):
  return _sum_of_rounds(f, step, end, integers, operands), (end, integers, operands)


def _sum_backward(f, step, residuals, dy):
  end, integers, operands = residuals

  def add(state):
    i, total = state
    back = jax.vjp(functools.partial(f, i, integers), operands)[1]
    return i + step, jax.tree.map(jnp.add, total, back(dy)[0])

  zero = jax.tree.map(jnp.zeros_like, operands)
  return None, None, _loop_until(end, add, zero)


_sum_of_rounds.defvjp(_sum_forward, _sum_backward)


def _among(index, experts: int, peers, copies):
  """Renumbers choices among all experts as choices among those that this device sends tokens to.

  A choice of any other expert becomes a choice of none. Experts are in order over the devices of `peers` x
  `copies`, `experts` on each.
  """
  n = _size(peers)
  columns = _size(copies)
  if columns > 1:
    mine = (index // experts) % columns == jax.lax.axis_index(copies)
    index = jnp.where(mine, index // (experts * columns) * experts + index % experts, n * experts)
  return jnp.minimum(index, n * experts)


def _few(x: jax.Array, devices: int = 1) -> bool:
  """Returns whether the tokens of so many devices, x [batch, length, embed] on each, go through all experts."""
  return platform() != 'cpu' and devices * x.shape[0] * x.shape[1] <= FEW_TOKENS


def _size(axes: tuple) -> int:
  """Returns the number of devices along these mesh axes."""
  return jax.lax.axis_size(axes) if axes else 1


def _exchange(x, experts: int, peers, back: bool = False):
  """Sends rows, ordered by the experts of all peers, to the devices of their experts; or `back`.

  The rows that arrive are ordered by this device's experts, and within an expert by peer.
  """
  if not peers:
    return x
  n = _size(peers)
  outer, inner = (experts, n) if back else (n, experts)

  def swap(x):
    return x.reshape(outer, inner, -1, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)

  x = swap(x) if back else x
  x = jax.lax.all_to_all(x, peers, 0, 0, tiled=True)
  return x if back else swap(x)
