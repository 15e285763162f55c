"""The experts of a mixture: how tokens reach them, and their stacked matrices.

A token's `active` choices are rows of one buffer ordered by expert. Dropless, an expert's rows are as many as
chose it, rounded up to a block (Gale et al. 2022, arXiv:2211.15841); with a capacity they are a fixed number
per sequence, and a choice that meets a full expert is dropped (Lepikhin et al. 2020, arXiv:2006.16668).
Tokens are moved by gathers in both directions, so neither pass scatters. Where experts lie on other devices
than the tokens, all_to_all takes the rows there and back.
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
    # A number of places is a capacity too: sequences stay whole.
    self.experts, self.active, self.places = experts, active, places
    self.capacity = 1.0 if capacity is None and places is not None else capacity
    self.activations = tuple(activations)

    def matrices(ins: dict, outs: dict):
      axes, shape = ('expert', *ins, *outs), (experts, *ins.values(), *outs.values())
      init = functools.partial(normal, stddev=math.prod(ins.values()) ** -0.5)
      matrix = Matrix(shape, axes, init, stacked=1, active=active / experts)
      return make_weight(matrix, weight, rngs=rngs)

    self.inputs = nnx.List([matrices({'embed': embed}, {'mlp': mlp}) for _ in self.activations])
    self.output = matrices({'mlp': mlp}, {'embed': embed})

  def __call__(
    self, x: jax.Array, weights: jax.Array, index: jax.Array, *, dropless: bool = False
  ) -> jax.Array:
    """Sum over a token's choices of weight x expert(x); a choice of expert `experts` is of none.

    `dropless` leaves the capacity out of account: in decoding there is no sequence to share it among.
    """
    axes, capacity = ('expert', None, 'mlp'), None if dropless else self.capacity
    inputs = [shard(w[...].astype(x.dtype), *axes) for w in self.inputs]
    output = shard(self.output[...].astype(x.dtype), 'expert', 'mlp', None)
    if jax.sharding.get_abstract_mesh().empty:
      return self.compute(x, weights, index, inputs, output, capacity)
    # With a capacity, a token's place depends on the sequence before it, so that sequences stay whole.
    tokens = ('batch', 'length' if capacity is None else None, None)
    here, there = spec(*tokens, shape=x.shape), spec(*axes, shape=inputs[0].shape)
    back = jax.P(there[0], there[2], None)
    used = {name for axis in here for name in _as_tuple(axis)}
    # Of the devices that experts are split over, some have tokens of their own: to those tokens are sent. The
    # others have the same tokens, and each takes those to its own experts (or its own columns of every expert).
    peers = tuple(name for name in _as_tuple(there[0]) if name in used)
    own = tuple(name for name in _as_tuple(there[0]) if name not in used)
    split = (*own, *_as_tuple(there[2]))

    def local(x, weights, index, inputs, output):
      index = _among(index, output.shape[0], peers, own)
      send = self.in_rounds if peers and capacity is None else self.compute
      y = send(x, weights, index, inputs, output, capacity, peers)
      return jax.lax.psum(y, split) if split else y

    x, weights, index = (shard(y, *tokens) for y in (x, weights, index))
    in_specs = (here, here, here, [there] * len(inputs), back)
    mapped = per_device(local, in_specs=in_specs, out_specs=here)
    return shard(mapped(x, weights, index, inputs, output), 'batch', 'sequence', None)

  def compute(self, x, weights, index, inputs, output, capacity, peers=()):
    """The sum over the choices of experts here, or, with a capacity, of all the peers'."""
    experts, n = output.shape[0], _size(peers)
    if capacity is None:
      row, rows, matmul = _dropless(index, experts)
    else:
      row, rows, matmul = _with_capacity(index, experts * n, self.experts, capacity, self.places)
    count, active = row.size, row.shape[-1]
    row = row.reshape(count)
    source = jnp.full(rows, count).at[row].set(jnp.arange(count), mode='drop')
    tokens = jnp.repeat(x.reshape(count // active, -1), active, axis=0)
    tokens = _exchange(_permute(tokens, source, row), experts, peers)
    hidden = (f(matmul(tokens, w)) for f, w in zip(self.activations, inputs, strict=True))
    y = matmul(functools.reduce(jnp.multiply, hidden), output)
    y = _permute(_exchange(y, experts, peers, back=True), row, source)
    return _weigh(y, weights).reshape(x.shape)

  def in_rounds(self, x, weights, index, inputs, output, capacity, peers):
    """Every choice is sent to the peer that has its expert, and what the expert makes of it is sent back.

    Arrays have one size on all devices, so a device sends `room` rows to each peer, 1.25 times what is fair,
    and as often as the fullest of all needs: once when experts are balanced. No choice is ever dropped.
    """
    experts, n = output.shape[0], _size(peers)
    flat, active = index.reshape(-1), index.shape[-1]
    tokens, count = flat.size // active, flat.size
    peer = flat // experts  # n where the choice is of none
    rank, sizes = _rank(peer, n)
    room = min(8 * math.ceil(1.25 * count / n / 8), tokens * min(active, experts))

    def send(first, choices, operands):
      (flat, peer, rank), (x, weights, inputs, output) = choices, operands
      place = rank - first
      row = jnp.where((peer < n) & (place >= 0) & (place < room), peer * room + place, n * room)
      source = jnp.full(n * room, count).at[row].set(jnp.arange(count), mode='drop')
      expert = (flat % experts).at[source].get(mode='fill', fill_value=experts)
      swap = lambda y: jax.lax.all_to_all(y, peers, 0, 0, tiled=True)
      rows = jnp.repeat(x.reshape(tokens, -1), active, axis=0)
      rows, expert = swap(_permute(rows, source, row)), swap(expert)
      one = jnp.ones((1, n * room, 1), weights.dtype)
      y = self.compute(rows[None], one, expert[None, :, None], inputs, output, None)
      return _weigh(_permute(swap(y[0]), row, source), weights)

    # All devices go on or none: a collective waits for everybody.
    most = jax.lax.pmax(jnp.max(sizes), tuple(jax.sharding.get_abstract_mesh().manual_axes))
    y = _sum_of_rounds(send, room, most, (flat, peer, rank), (x, weights, inputs, output))
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_rounds(f, step: int, end: jax.Array, integers, operands):
  """Sum of f(i, integers, operands) over i = 0, step, ... below `end`; the gradient computes every f again."""
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, 0, integers, operands))
  add = lambda state: (state[0] + step, state[1] + f(state[0], integers, operands))
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


def _among(index, experts: int, peers, own):
  """Choices of all experts as choices among the peers' that this device is to send to, and none for the rest.

  Experts lie in order over the devices of `peers` x `own`, `experts` on each.
  """
  n, columns = _size(peers), _size(own)
  if columns > 1:
    mine = (index // experts) % columns == jax.lax.axis_index(own)
    index = jnp.where(mine, index // (experts * columns) * experts + index % experts, n * experts)
  return jnp.minimum(index, n * experts)


def _size(axes: tuple) -> int:
  """How many devices there are along these mesh axes."""
  return jax.lax.axis_size(axes) if axes else 1


def _exchange(x, experts: int, peers, back: bool = False):
  """Rows ordered by all the peers' experts, to rows of the experts here in the order of the peers; or back."""
  if not peers:
    return x
  n = _size(peers)
  first, then = (experts, n) if back else (n, experts)
  swap = lambda x: x.reshape(first, then, -1, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)
  x = swap(x) if back else x
  x = jax.lax.all_to_all(x, peers, 0, 0, tiled=True)
  return x if back else swap(x)


def _weigh(y: jax.Array, weights: jax.Array) -> jax.Array:
  """[tokens, embed]: the sum over a token's choices, of rows [tokens x choices, embed]."""
  weights = weights.reshape(-1, weights.shape[-1])
  y = y.reshape(*weights.shape, -1)
  return jnp.einsum('nke,nk->ne', y, weights.astype(y.dtype))


def _as_tuple(axis) -> tuple:
  return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """x[index], zero where the index is past the end; `inverse` undoes it, so the gradient is a gather too."""
  return x.at[index].get(mode='fill', fill_value=0)


_permute.defvjp(
  lambda x, index, inverse: (_permute(x, index, inverse), inverse),
  lambda inverse, dy: (dy.at[inverse].get(mode='fill', fill_value=0), None, None),
)


def _rank(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Of every element its place among those of its group, in order; and the sizes of the groups."""
  flat = group.reshape(-1)
  place = jnp.argsort(jnp.argsort(flat, stable=True))
  sizes = jnp.bincount(flat, length=groups + 1)
  return (place - (jnp.cumsum(sizes) - sizes)[flat]).reshape(group.shape), sizes[:groups]


def _dropless(index: jax.Array, experts: int):
  """Row of every choice in a buffer where each expert's rows begin at a block; the rows; the product."""
  rank, sizes = _rank(index, experts)
  # About four blocks an expert: less padding than an eighth, and matrices large enough to be fast.
  block = min(256, max(8, 2 ** math.ceil(math.log2(index.size / experts / 4 + 1))))
  sizes = -(-sizes // block) * block
  rows = (-(-index.size // block) + experts) * block
  start = jnp.append(jnp.cumsum(sizes) - sizes, rows)
  row = jnp.where(index < experts, start[index] + rank, rows)
  return row, rows, lambda x, w: grouped_matmul(x, w, sizes, block)


def _with_capacity(
  index: jax.Array, experts: int, all_experts: int, factor: float, places: int | None
):
  """The same with room for `factor` times a sequence's fair share, or `places`, in every expert."""
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
