"""Layers split over devices: a pipeline of stages that microbatches go round.

The schedule is circular (interleaved in Narayanan et al. 2021, arXiv:2104.04473, section 2.2): the layers
are cut into stages x rounds blocks, stage s has the blocks s, s + stages, ..., and every microbatch passes all
stages once per round. Of ticks = rounds x microbatches + stages - 1 a stage works in rounds x microbatches, so
the bubble is (stages - 1) / ticks of the time; the backward pass is the same in reverse.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import Invalid
from research.model.part import Context
from research.parallel.axes import axes_of, spec
from research.parallel.mesh import Mesh, as_tuple, pipeline_shape

_ROWS = ('positions', 'segments', 'prefix', 'encoded', 'encoded_segments')  # with a batch axis


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Who works on what when; `axis` is the mesh axis of the stages."""

  axis: str
  stages: int
  rounds: int
  microbatches: int

  @property
  def ticks(self) -> int:
    return self.rounds * self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """The fraction of the time that a stage waits."""
    return (self.stages - 1) / self.ticks


def over_stages(x: jax.Array) -> jax.Array:
  """[layers, ...] with its layers split over the stages of the mesh in use."""
  if jax.typeof(x).sharding.mesh.empty:
    return x
  rest = axes_of(x)[1:]
  return jax.sharding.reshard(x, jax.P(spec('layers', shape=x.shape[:1])[0], *rest))


def schedule_of(layers: int) -> Schedule | None:
  """How the mesh in use pipelines a stack of so many layers; None when it does not.

  Raises:
    Invalid: the layers are not a multiple of stages x rounds, or there are too few microbatches.
  """
  axis = spec('layers')[0]
  if axis is None:
    return None
  stages = jax.sharding.get_abstract_mesh().shape[axis]
  rounds, microbatches = pipeline_shape()
  microbatches = stages if microbatches is None else microbatches
  if microbatches < stages:
    why = f'{microbatches} microbatches are less than the {stages} stages, of which some would never work.'
    raise Invalid(Mesh, 'stage_microbatches', why)
  if layers % (stages * rounds):
    why = f'a stack of {layers} layers does not go into {stages} stages x {rounds} rounds of equal blocks; '
    raise Invalid(
      Mesh, 'stage', why + 'change Mesh.stage, Mesh.stage_rounds or the number of layers.'
    )
  return Schedule(axis, stages, rounds, microbatches)


def pipelined(
  schedule: Schedule,
  block: Callable,
  layers,
  x: jax.Array,
  context: Context,
) -> tuple[jax.Array, dict]:
  """x after all the layers, and their penalties.

  Where the stages do more than one round, their parameters are exchanged first (and the gradients after):
  parameters lie in order, as in a checkpoint, and a stage's blocks do not follow each other.

  Args:
    block: `block(x, layers of one block, context) -> (x, penalties)`.
    layers: a tree of arrays [layers, ...], the first axis split over the stages.
    x: [batch, length, embed]; the same on all stages, as is the result.
    context: its arrays by row are cut as x is.

  Returns:
    x, and the means over the microbatches of every penalty, weighted by their tokens: what is not linear in the
    tokens (a load balance) is of a microbatch, as it is with `Run.microbatches`.
  """
  n = schedule.microbatches
  shards = math.prod(
    jax.sharding.get_abstract_mesh().shape[axis] for axis in as_tuple(axes_of(x)[0])
  )
  if x.shape[0] % (n * shards):
    why = f'{n} microbatches of a batch split over {shards} devices do not divide its {x.shape[0]} rows; '
    raise Invalid(Mesh, 'stage_microbatches', why + 'change it or the batch size.')
  rows = {name: getattr(context, name) for name in _ROWS}
  rows = {name: _cut(value, n) for name, value in rows.items() if value is not None}
  shared = dataclasses.replace(context, bias=None, **dict.fromkeys(_ROWS))

  def run(here, layers, xs, rows, bias):
    near = dataclasses.replace(shared, bias=bias)
    return _stage(schedule, block, here[0], layers, xs, rows, near)

  split, whole = jax.P(schedule.axis), jax.P()
  here = jax.sharding.reshard(jnp.arange(schedule.stages), split)
  mapped = jax.shard_map(
    run, in_specs=(split, split, whole, whole, whole), out_specs=(whole, whole),
    axis_names={schedule.axis}, check_vma=False,
  )  # fmt: skip
  ys, penalties = mapped(here, layers, _cut(x, n), rows, context.bias)
  ys = jnp.moveaxis(ys, 0, 1).reshape(x.shape, out_sharding=jax.P(*axes_of(x)))
  return ys, penalties


def _cut(x: jax.Array, n: int) -> jax.Array:
  """[microbatches, rows, ...]: every microbatch takes every n-th row, so that all devices have rows of each."""
  rows, *rest = axes_of(x)
  x = x.reshape(-1, n, *x.shape[1:], out_sharding=jax.P(rows, None, *rest))
  return jnp.moveaxis(x, 1, 0)


def _at(tree, i):
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _stage(schedule, block, here, layers, xs, rows, context):
  """What the devices of stage `here` do."""
  stages, n, last = schedule.stages, schedule.microbatches, schedule.rounds * schedule.microbatches
  blocks = jax.tree.map(lambda w: _blocks(schedule, here, w), layers)
  around = [(s, (s + 1) % stages) for s in range(stages)]
  weights = _weights(rows, n)

  def keep(waiting, arriving, t):
    """What comes from the last stage waits at the first for its next round; the first `stages` are nothing."""
    slot = (t - stages) % n
    new = jnp.where(t >= stages, arriving, _at(waiting, slot))
    return jax.lax.dynamic_update_index_in_dim(waiting, new, slot, 0)

  def tick(carry, t):
    waiting, arriving = carry
    waiting = keep(waiting, arriving, t)
    i = jnp.clip(
      t - here, 0, last - 1
    )  # which of its tasks; before and after those it works for nothing
    x = jnp.where(here == 0, _at(waiting, i % n), arriving)
    near = dataclasses.replace(context, **_at(rows, i % n))
    y, penalties = block(x, _at(blocks, i // n), near)
    weight = jnp.where(t - here == i, weights[i % n], 0.0)
    penalties = jax.tree.map(lambda p: jnp.sum(p) * weight, penalties)
    return (waiting, jax.lax.ppermute(y, schedule.axis, around)), penalties

  start = (xs, jnp.zeros_like(xs[0]))
  (waiting, arriving), penalties = jax.lax.scan(tick, start, jnp.arange(schedule.ticks))
  ys = keep(waiting, arriving, schedule.ticks)
  total = lambda y: jax.lax.psum(y, schedule.axis)
  penalties = jax.tree.map(lambda p: total(jnp.sum(p)), penalties)
  return total(jnp.where(here == 0, ys, 0)), penalties


def _weights(rows: dict, n: int) -> jax.Array:
  """[microbatches]: the part of the tokens that each has."""
  if 'segments' not in rows:
    return jnp.full(n, 1 / n)
  tokens = jnp.sum(rows['segments'] > 0, axis=(1, 2), dtype=jnp.float32)
  return tokens / jnp.maximum(jnp.sum(tokens), 1.0)


def _blocks(schedule: Schedule, here, w: jax.Array) -> jax.Array:
  """[rounds, layers of a block, ...] of stage `here`, from its part of the layers in order."""
  stages, rounds = schedule.stages, schedule.rounds
  w = w.reshape(rounds, -1, *w.shape[1:], out_sharding=jax.P(None, None, *axes_of(w)[1:]))
  if rounds == 1:
    return w
  # all_to_all of equal parts: `wide` blocks from every stage to every stage, not all of which are of use.
  wide = -(-rounds // stages)
  send, take = np.zeros((stages, stages, wide), np.int32), np.zeros((stages, rounds), np.int32)
  used = np.zeros((stages, stages), np.int32)
  for number in range(stages * rounds):
    (source, i), (turn, to) = divmod(number, rounds), divmod(number, stages)
    slot = used[source, to]
    send[source, to, slot], take[to, turn] = i, source * wide + slot
    used[source, to] += 1
  w = jnp.take(w, jnp.asarray(send)[here].reshape(-1), axis=0)
  w = jax.lax.all_to_all(w, schedule.axis, 0, 0, tiled=True)
  return jnp.take(w, jnp.asarray(take)[here], axis=0)
