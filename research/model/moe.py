"""Mixtures of experts: a router, the experts, and the part around them.

A token's `active` choices are rows of one buffer ordered by expert. Dropless, an expert's rows are as many as
chose it, rounded up to a block (Gale et al. 2022, arXiv:2211.15841); with a capacity they are a fixed number
per sequence, and a choice that finds its expert full is dropped (Lepikhin et al. 2020, arXiv:2006.16668).
Tokens are moved by gathers in both directions, so neither pass scatters. Where experts lie on other devices
than the tokens, all_to_all takes the rows there and back.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.errors import Invalid, did_you_mean
from research.model.grouped import grouped_matmul
from research.model.layers import Context, Part, check_sizes, normal, param
from research.sharding import per_device, shard, spec

SCORES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


class Router(nnx.Module):
  """Which experts a token goes to, and with what weights; in float32 throughout.

  scores = softmax(x W) or sigmoid(x W); the `active` best are chosen; their scores are the weights.

  Knobs:
    active: experts per token. 1 is Switch (Fedus et al. 2021, arXiv:2101.03961), 2 is Mixtral.
    scores: 'softmax', or 'sigmoid' (DeepSeek-V3, arXiv:2412.19437, equation 15).
    normalise: weights divided by their sum (Mixtral: the same as a softmax over the chosen logits).
    scale: of the weights, after that (DeepSeek's routed scaling factor).
    groups, active_groups: choose among the experts of the `active_groups` best of `groups` groups.
    group_top: a group is as good as the sum of its best so many (1 in DeepSeek-V2, 2 in V3).
    selection_bias: rate of a bias per expert that is added to its score when choosing, not when weighing. Its
      gradient is the rate times the sign of the expert's load above the mean (DeepSeek-V3, section 2.1.2:
      balance without an auxiliary loss); None for no such bias.
    balance: coefficient of experts x sum over experts of load x mean score, which is 1 at uniform
      (Switch, equation 4).
    z_loss: coefficient of the mean squared logsumexp of the logits (Zoph et al. 2022, arXiv:2202.08906).
  """

  def __init__(
    self,
    embed: int,
    experts: int,
    *,
    active: int,
    scores: str = 'softmax',
    normalise: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    active_groups: int = 1,
    group_top: int = 1,
    selection_bias: float | None = None,
    balance: float = 0.01,
    z_loss: float = 0.001,
    rngs: nnx.Rngs,
  ):
    check_sizes(Router, active=active, groups=groups, active_groups=active_groups)
    if scores not in SCORES:
      raise Invalid(Router, 'scores', f'no scores {scores!r}.{did_you_mean(scores, SCORES)}')
    if experts % groups:
      raise Invalid(Router, 'groups', f'{groups} groups do not divide the {experts} experts.')
    if active_groups > groups:
      raise Invalid(Router, 'active_groups', f'{active_groups} of {groups} groups is too many.')
    if active > experts * active_groups // groups:
      raise Invalid(
        Router,
        'active',
        f'{active} is more than the {experts * active_groups // groups} to choose from.',
      )
    self.experts, self.active, self.scores = experts, active, scores
    self.normalise, self.scale, self.rate = normalise, scale, selection_bias
    self.groups, self.active_groups, self.group_top = groups, active_groups, group_top
    self.balance, self.z_loss = balance, z_loss
    self.kernel = param(
      rngs, (embed, experts), ('embed', None), functools.partial(normal, stddev=embed**-0.5)
    )
    zeros = nnx.initializers.zeros
    self.bias = param(rngs, (experts,), (None,), zeros) if selection_bias is not None else None

  def __call__(self, x: jax.Array, real: jax.Array | None):
    """x [batch, length, embed] and whether each token is real [batch, length] (None: all are).

    Returns:
      (weights, index), both [batch, length, active], and the penalties.
    """
    kernel = shard(self.kernel[...], None, None)
    here = spec('batch', 'length', None)
    logits = jnp.einsum(
      'ble,ex->blx', x.astype(jnp.float32), kernel, precision='highest', out_sharding=here
    )
    scores = SCORES[self.scores](logits)
    index = jax.lax.stop_gradient(self.choose(scores))
    weights = jnp.sum(jnp.where(_one_hot(index, self.experts), scores[:, :, None], 0.0), axis=-1)
    if self.normalise:
      weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * self.scale, index, self.penalties(logits, scores, index, real)

  def choose(self, scores: jax.Array) -> jax.Array:
    """The experts [batch, length, active] that the scores [batch, length, experts] choose."""
    if self.bias is not None:
      scores = scores + self.bias[...]
    if self.groups > 1:
      shape = (*scores.shape[:2], self.groups, self.experts // self.groups)
      grouped = scores.reshape(shape)
      best = jnp.sum(jax.lax.top_k(grouped, self.group_top)[0], axis=-1)
      chosen = _one_hot(jax.lax.top_k(best, self.active_groups)[1], self.groups).any(axis=2)
      scores = jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, self.active)[1]

  def penalties(self, logits, scores, index, real) -> dict[str, jax.Array]:
    count = logits.shape[0] * logits.shape[1]
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    count = count if real is None else jnp.maximum(jnp.sum(weight), 1.0)
    mean = lambda y: jnp.sum(y * weight[..., None], axis=(0, 1)) / count
    load = mean(jnp.sum(_one_hot(index, self.experts), axis=2)) / self.active
    penalties = {}
    if self.balance:
      share = scores / jnp.sum(scores, axis=-1, keepdims=True)
      penalties['load_balance'] = self.balance * self.experts * jnp.sum(load * mean(share))
    if self.z_loss:
      z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
      penalties['router_z'] = self.z_loss * jnp.sum(mean(z * z))
    if self.bias is not None:
      # A penalty of value zero, whose gradient is the update that the paper makes by hand.
      push = jnp.sum(self.bias[...] * jnp.sign(load - 1 / self.experts))
      penalties['selection_bias'] = self.rate * (push - jax.lax.stop_gradient(push))
    return penalties


def _one_hot(index: jax.Array, n: int) -> jax.Array:
  return index[..., None] == jnp.arange(n, dtype=index.dtype)


class Experts(nnx.Module):
  """`experts` MLPs with stacked weights: [expert, embed, mlp] and back. `active_fraction` is for counting."""

  def __init__(
    self,
    embed: int,
    experts: int,
    *,
    active: int,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    capacity: float | None,
    rngs: nnx.Rngs,
  ):
    self.experts, self.active, self.capacity = experts, active, capacity
    self.active_fraction = active / experts
    self.activations = tuple(activations)
    axes, init = ('expert', 'embed', 'mlp'), functools.partial(normal, stddev=embed**-0.5)
    self.inputs = nnx.List(
      [param(rngs, (experts, embed, mlp), axes, init) for _ in self.activations]
    )
    axes, init = ('expert', 'mlp', 'embed'), functools.partial(normal, stddev=mlp**-0.5)
    self.output = param(rngs, (experts, mlp, embed), axes, init)

  def __call__(self, x: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Sum over a token's choices of weight x expert(x); a choice of expert `experts` is of none."""
    axes = ('expert', None, 'mlp')
    inputs = [shard(w[...].astype(x.dtype), *axes) for w in self.inputs]
    output = shard(self.output[...].astype(x.dtype), 'expert', 'mlp', None)
    if jax.sharding.get_abstract_mesh().empty:
      return self.compute(x, weights, index, inputs, output, self.capacity)
    # With a capacity, a token's place depends on the sequence before it, so that sequences stay whole.
    tokens = ('batch', 'length' if self.capacity is None else None, None)
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
      send = self.in_rounds if peers and self.capacity is None else self.compute
      y = send(x, weights, index, inputs, output, self.capacity, peers)
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
      row, rows, matmul = _with_capacity(index, experts * n, self.experts, capacity)
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


def _with_capacity(index: jax.Array, experts: int, all_experts: int, factor: float):
  """The same with room for `factor` times a sequence's fair share in every expert; earlier tokens first."""
  batch, length, active = index.shape
  capacity = min(math.ceil(factor * length * active / all_experts), length)
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


class MoE(nnx.Module):
  """Mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538).

  y = sum over the chosen experts of weight x expert(x), + shared(x). Padding goes to no expert.

  Knobs:
    experts, mlp, activations: as many MLPs of this width (see `layers.Mlp`).
    router: `Router`, which also says how many are active.
    capacity: None is dropless. Else an expert takes at most capacity x its fair share of every sequence, the
      earlier tokens first: no token's place depends on a later one, but one packed document's may on another.
    shared: an MLP that every token goes through (DeepSeek-V2, Qwen 2 MoE).
    shared_gate: the shared MLP is weighed by sigmoid(x w) (Qwen 2 MoE).
  """

  def __init__(
    self,
    embed: int,
    *,
    experts: int,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    router: Part,
    capacity: float | None = None,
    shared: Part | None = None,
    shared_gate: bool = False,
    rngs: nnx.Rngs,
  ):
    check_sizes(MoE, experts=experts, mlp=mlp)
    if capacity is not None and capacity <= 0:
      raise Invalid(
        MoE, 'capacity', f'{capacity!r} is not a positive number (or None for dropless).'
      )
    if shared_gate and shared is None:
      raise Invalid(MoE, 'shared_gate', 'there is no shared MLP to gate; set MoE.shared.')
    self.router = router(embed, experts, rngs=rngs)
    self.experts = Experts(
      embed, experts, active=self.router.active, mlp=mlp, activations=activations, capacity=capacity,
      rngs=rngs,
    )  # fmt: skip
    self.shared = shared(embed, rngs=rngs) if shared else None
    init = functools.partial(normal, stddev=embed**-0.5)
    self.shared_gate = param(rngs, (embed,), (None,), init) if shared_gate else None

  def __call__(self, x: jax.Array, context: Context):
    real = None if context.segments is None else context.segments > 0
    weights, index, penalties = self.router(x, real)
    if real is not None:
      index = jnp.where(real[..., None], index, self.router.experts)
    y = self.experts(x, weights, index)
    if self.shared is not None:
      shared, more = self.shared(x, context)
      penalties = {**penalties, **more}
      if self.shared_gate is not None:
        gate = jnp.sum(x.astype(jnp.float32) * self.shared_gate[...], axis=-1, keepdims=True)
        shared = shared * jax.nn.sigmoid(gate).astype(x.dtype)
      y = y + shared
    return y, penalties
