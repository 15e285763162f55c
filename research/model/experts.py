"""The experts of a mixture: their stacked matrices, and the routes of tokens to them.

The `active` choices of every token become rows of one buffer, ordered by expert. Without a capacity an expert
has as many rows as tokens chose it, rounded up to a block (dropless: Gale et al. 2022, arXiv:2211.15841). With
a capacity it has a fixed number of rows per sequence, and choices beyond it are dropped (Lepikhin et al. 2020,
arXiv:2006.16668). Gathers move tokens in both directions, so neither pass scatters. Where experts and tokens
are on different devices, an all_to_all moves the rows there and back.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.kernels.grouped import grouped_matmul
from research.model.parameters import normal
from research.model.part import Factory
from research.model.weights import Matrix, make_weight
from research.parallel.axes import per_device, shard, spec
from research.parallel.mesh import as_tuple


class Experts(nnx.Module):
  """`experts` MLPs with stacked weights: [expert, embed, mlp] and back."""

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
    # A number of places is a capacity too. Either keeps sequences whole on a device.
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
    """The sum over a token's choices of weight x expert(x). The index `experts` chooses no expert.

    `dropless` ignores the capacity: in decoding there is no whole sequence to share it.
    """
    axes = ('expert', None, 'mlp')
    capacity = None if dropless else self.capacity
    inputs = [shard(w[...].astype(x.dtype), *axes) for w in self.inputs]
    output = shard(self.output[...].astype(x.dtype), 'expert', 'mlp', None)
    if jax.sharding.get_abstract_mesh().empty:
      return self.compute(x, weights, index, inputs, output, capacity)
    # With a capacity, a token's place depends on the sequence before it, so that sequences stay whole.
    tokens = ('batch', 'length' if capacity is None else None, None)
    token_spec = spec(*tokens, shape=x.shape)
    input_spec = spec(*axes, shape=inputs[0].shape)
    output_spec = jax.P(input_spec[0], input_spec[2], None)
    token_axes = {name for axis in token_spec for name in as_tuple(axis)}
    # Of the mesh axes that split experts, some split tokens too: along `peers`, tokens are sent to their
    # experts. Along `copies`, devices have the same tokens, and each computes its own experts (or its own
    # columns of all).
    peers = tuple(name for name in as_tuple(input_spec[0]) if name in token_axes)
    copies = tuple(name for name in as_tuple(input_spec[0]) if name not in token_axes)
    split = (*copies, *as_tuple(input_spec[2]))

    def local(x, weights, index, inputs, output):
      index = _among(index, output.shape[0], peers, copies)
      send = self.in_rounds if peers and capacity is None else self.compute
      y = send(x, weights, index, inputs, output, capacity, peers)
      return jax.lax.psum(y, split) if split else y

    x, weights, index = (shard(y, *tokens) for y in (x, weights, index))
    in_specs = (token_spec, token_spec, token_spec, [input_spec] * len(inputs), output_spec)
    mapped = per_device(local, in_specs=in_specs, out_specs=token_spec)
    return shard(mapped(x, weights, index, inputs, output), 'batch', 'sequence', None)

  def compute(self, x, weights, index, inputs, output, capacity, peers=()):
    """The sum over choices of the experts on this device, or with a capacity of those of all peers."""
    experts = output.shape[0]
    n = _size(peers)
    if capacity is None:
      row, rows, matmul = _dropless(index, experts)
    else:
      row, rows, matmul = _with_capacity(index, experts * n, self.experts, capacity, self.places)
    count = row.size
    active = row.shape[-1]
    row = row.reshape(count)
    source = jnp.full(rows, count).at[row].set(jnp.arange(count), mode='drop')
    tokens = jnp.repeat(x.reshape(count // active, -1), active, axis=0)
    tokens = _exchange(_permute(tokens, source, row), experts, peers)
    hidden = (f(matmul(tokens, w)) for f, w in zip(self.activations, inputs, strict=True))
    y = matmul(functools.reduce(jnp.multiply, hidden), output)
    y = _permute(_exchange(y, experts, peers, back=True), row, source)
    return _weigh(y, weights).reshape(x.shape)

  def in_rounds(self, x, weights, index, inputs, output, capacity, peers):
    """Sends every choice to the peer that has its expert, and the result back.

    Arrays have the same size on all devices, so in a round each device sends `room` rows to each peer: 1.25
    times an equal share. There are as many rounds as the fullest peer needs, one when experts are balanced. No
    choice is ever dropped.
    """
    experts = output.shape[0]
    n = _size(peers)
    flat = index.reshape(-1)
    active = index.shape[-1]
    count = flat.size
    tokens = count // active
    peer = flat // experts  # n for a choice of no expert
    rank, sizes = _rank(peer, n)
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
      rows = swap(_permute(rows, source, row))
      expert = swap(expert)
      ones = jnp.ones((1, n * room, 1), weights.dtype)
      y = self.compute(rows[None], ones, expert[None, :, None], inputs, output, None)
      return _weigh(_permute(swap(y[0]), row, source), weights)

    # All devices must do as many rounds, because a collective waits for every device.
    largest = jax.lax.pmax(jnp.max(sizes), tuple(jax.sharding.get_abstract_mesh().manual_axes))
    y = _sum_of_rounds(send, room, largest, (flat, peer, rank), (x, weights, inputs, output))
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_rounds(f, step: int, end: jax.Array, integers, operands):
  """The sum of f(i, integers, operands) over i = 0, step, ... < `end`. The gradient computes every f again."""
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, 0, integers, operands))

  def add(state):
    i, total = state
    return i + step, total + f(i, integers, operands)

  return jax.lax.while_loop(lambda state: state[0] < end, add, (0, zero))[1]


def _sum_forward(f, step, end, integers, operands):
  return _sum_of_rounds(f, step, end, integers, operands), (end, integers, operands)


def _sum_backward(f, step, residuals, dy):
  end, integers, operands = residuals

  def add(state):
    i, total = state
    back = jax.vjp(functools.partial(f, i, integers), operands)[1]
    return i + step, jax.tree.map(jnp.add, total, back(dy)[0])

  zero = jax.tree.map(jnp.zeros_like, operands)
  return None, None, jax.lax.while_loop(lambda state: state[0] < end, add, (0, zero))[1]


_sum_of_rounds.defvjp(_sum_forward, _sum_backward)


def _among(index, experts: int, peers, copies):
  """Choices among all experts as choices among those that this device sends to; the others choose no expert.

  Experts are in order over the devices of `peers` x `copies`, `experts` on each.
  """
  n = _size(peers)
  columns = _size(copies)
  if columns > 1:
    mine = (index // experts) % columns == jax.lax.axis_index(copies)
    index = jnp.where(mine, index // (experts * columns) * experts + index % experts, n * experts)
  return jnp.minimum(index, n * experts)


def _size(axes: tuple) -> int:
  """The number of devices along these mesh axes."""
  return jax.lax.axis_size(axes) if axes else 1


def _exchange(x, experts: int, peers, back: bool = False):
  """Rows ordered by the experts of all peers to rows of this device's experts, ordered by peer; or back."""
  if not peers:
    return x
  n = _size(peers)
  outer, inner = (experts, n) if back else (n, experts)

  def swap(x):
    return x.reshape(outer, inner, -1, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)

  x = swap(x) if back else x
  x = jax.lax.all_to_all(x, peers, 0, 0, tiled=True)
  return x if back else swap(x)


def _weigh(y: jax.Array, weights: jax.Array) -> jax.Array:
  """[tokens, embed]: the weighted sum over each token's choices, from rows [tokens x choices, embed]."""
  weights = weights.reshape(-1, weights.shape[-1])
  y = y.reshape(*weights.shape, -1)
  return jnp.einsum('nke,nk->ne', y, weights.astype(y.dtype))


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """x[index], and 0 where an index is past the end. `inverse` makes the gradient a gather too."""
  return x.at[index].get(mode='fill', fill_value=0)


_permute.defvjp(
  lambda x, index, inverse: (_permute(x, index, inverse), inverse),
  lambda inverse, dy: (dy.at[inverse].get(mode='fill', fill_value=0), None, None),
)


def _rank(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """The number of earlier elements in each element's group; and the sizes of the groups."""
  flat = group.reshape(-1)
  place = jnp.argsort(jnp.argsort(flat, stable=True))
  sizes = jnp.bincount(flat, length=groups + 1)
  return (place - (jnp.cumsum(sizes) - sizes)[flat]).reshape(group.shape), sizes[:groups]


def _dropless(index: jax.Array, experts: int):
  """(row of every choice, number of rows, product) of a buffer in which every expert starts at a block."""
  rank, sizes = _rank(index, experts)
  # About four blocks per expert: at most an eighth is padding, and the blocks are large enough to be fast.
  block = min(256, max(8, 2 ** math.ceil(math.log2(index.size / experts / 4 + 1))))
  sizes = -(-sizes // block) * block
  rows = (-(-index.size // block) + experts) * block
  start = jnp.append(jnp.cumsum(sizes) - sizes, rows)
  row = jnp.where(index < experts, start[index] + rank, rows)
  return row, rows, lambda x, w: grouped_matmul(x, w, sizes, block)


def _with_capacity(
  index: jax.Array, experts: int, all_experts: int, factor: float, places: int | None
):
  """As `_dropless`, with room in every expert for `factor` equal shares of a sequence, or for `places`."""
  batch, length, active = index.shape
  share = math.ceil(factor * length * active / all_experts)
  capacity = min(share if places is None else places, length)
  rows = experts * batch * capacity
  group = jnp.where(
    index < experts, index * batch + jnp.arange(batch)[:, None, None], experts * batch
  )
  rank, _ = _rank(group, experts * batch)
  row = jnp.where((group < experts * batch) & (rank < capacity), group * capacity + rank, rows)

  def matmul(x, w):
    y = jnp.einsum('xre,xem->xrm', x.reshape(w.shape[0], -1, x.shape[-1]), w)
    return y.reshape(rows, -1)

  return row, rows, matmul
