"""Pipeline parallelism: the layers are split over stages, through which microbatches circulate.

The schedule is circular ("interleaved" in Narayanan et al. 2021, arXiv:2104.04473, section 2.2). The layers are
cut into stages x rounds blocks. Stage s has the blocks s, s + stages, ..., and every microbatch passes all
stages once per round. A stage computes in rounds x microbatches of the rounds x microbatches + stages - 1
ticks, so the bubble is (stages - 1) / ticks of the time. The backward pass is the same in reverse.
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

# Fields of `Context` with a batch axis.
_ROWS = ('positions', 'segments', 'prefix', 'encoded', 'encoded_segments', 'turns')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of a pipeline.

  Attributes:
    axis: the mesh axis of the stages.
    stages: devices along that axis.
    rounds: how often a microbatch passes all stages.
    microbatches: parts of a batch.
  """

  axis: str
  stages: int
  rounds: int
  microbatches: int

  @property
  def ticks(self) -> int:
    return self.rounds * self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """The fraction of the time that a stage is idle."""
    return (self.stages - 1) / self.ticks


def over_stages(x: jax.Array) -> jax.Array:
  """Splits the first axis of x [layers, ...] over the stages of the mesh in use."""
  if jax.typeof(x).sharding.mesh.empty:
    return x
  stages = spec('layers', shape=x.shape[:1])[0]
  return jax.sharding.reshard(x, jax.P(stages, *axes_of(x)[1:]))


def schedule_in_use() -> Schedule | None:
  """Returns the schedule of every stack on the mesh in use; None if the mesh has no stages.

  Raises:
    Invalid: there are too few microbatches.
  """
  axis = spec('layers')[0]
  if axis is None:
    return None
  stages = jax.sharding.get_abstract_mesh().shape[axis]
  rounds, microbatches = pipeline_shape()
  microbatches = stages if microbatches is None else microbatches
  if microbatches < stages:
    why = (
      f'{microbatches} microbatches are fewer than the {stages} stages, and some stages would be idle; '
      'raise it or lower Mesh.stage.'
    )
    raise Invalid(Mesh, 'stage_microbatches', why)
  return Schedule(axis, stages, rounds, microbatches)


def schedule_of(layers: int) -> Schedule | None:
  """Returns the schedule of a stack of layers on the mesh in use; None if the mesh has no stages.

  Raises:
    Invalid: the layers are not a multiple of stages x rounds, or there are too few microbatches.
  """
  schedule = schedule_in_use()
  if schedule is not None and layers % (schedule.stages * schedule.rounds):
    why = (
      f'a stack of {layers} layers cannot be cut into {schedule.stages} stages x {schedule.rounds} '
      'rounds of equal blocks; change Mesh.stage, Mesh.stage_rounds or the number of layers.'
    )
    raise Invalid(Mesh, 'stage', why)
  return schedule


def pipelined(
  schedule: Schedule,
  block: Callable,
  layers,
  x: jax.Array,
  context: Context,
) -> tuple[jax.Array, dict]:
  """Applies all the layers to x, stage by stage.

  With more than one round the stages first exchange parameters, and their gradients afterwards: parameters are
  stored in the order of the layers, and the blocks of a stage are not consecutive.

  Args:
    schedule: the schedule.
    block: `block(x, layers of one block, context) -> (x, penalties)`.
    layers: a tree of arrays [layers, ...], the first axis split over the stages.
    x: [batch, length, embed]; equal on all stages, like the result.
    context: its arrays with a batch axis are cut into microbatches like x.

  Returns:
    x after the layers, and every penalty as the mean over microbatches, weighted by their tokens. A penalty
    that is not linear in the tokens (a load balance) is computed per microbatch, as with `Run.microbatches`.

  Raises:
    Invalid: the microbatches do not divide the batch.
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

  def run(stage, layers, xs, rows, bias):
    context = dataclasses.replace(shared, bias=bias)
    return _stage(schedule, block, stage[0], layers, xs, rows, context)

  split = jax.P(schedule.axis)
  whole = jax.P()
  stage_numbers = jax.sharding.reshard(jnp.arange(schedule.stages), split)
  mapped = jax.shard_map(
    run, in_specs=(split, split, whole, whole, whole), out_specs=(whole, whole),
    axis_names={schedule.axis}, check_vma=False,
  )  # fmt: skip
  ys, penalties = mapped(stage_numbers, layers, _cut(x, n), rows, context.bias)
  ys = jnp.moveaxis(ys, 0, 1).reshape(x.shape, out_sharding=jax.P(*axes_of(x)))
  return ys, penalties


def _cut(x: jax.Array, n: int) -> jax.Array:
  """Cuts x [batch, ...] into [microbatches, rows, ...].

  A microbatch takes every n-th row, so that every device has rows of every microbatch.
  """
  rows, *others = axes_of(x)
  x = x.reshape(-1, n, *x.shape[1:], out_sharding=jax.P(rows, None, *others))
  return jnp.moveaxis(x, 1, 0)


def _take(tree, i):
  """Returns entry i of the first axis of every array."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _stage(schedule, block, stage, layers, xs, rows, context):
  """What the devices of stage number `stage` compute: every tick, one block for one microbatch."""
  stages = schedule.stages
  n = schedule.microbatches
  tasks = schedule.rounds * n  # a task is one block for one microbatch
  blocks = jax.tree.map(lambda w: _blocks(schedule, stage, w), layers)
  around = [(s, (s + 1) % stages) for s in range(stages)]
  weights = _weights(rows, n)

  def keep(waiting, arriving, t):
    """Stores a microbatch from the last stage until its next round. The first `stages` ticks send none."""
    slot = (t - stages) % n
    new = jnp.where(t >= stages, arriving, _take(waiting, slot))
    return jax.lax.dynamic_update_index_in_dim(waiting, new, slot, 0)

  def tick(carry, t):
    waiting, arriving = carry
    waiting = keep(waiting, arriving, t)
    # Before its first task and after its last one a stage repeats that task, and the result is discarded.
    i = jnp.clip(t - stage, 0, tasks - 1)
    x = jnp.where(stage == 0, _take(waiting, i % n), arriving)
    of_microbatch = dataclasses.replace(context, **_take(rows, i % n))
    y, penalties = block(x, _take(blocks, i // n), of_microbatch)
    weight = jnp.where(t - stage == i, weights[i % n], 0.0)
    penalties = jax.tree.map(lambda p: jnp.sum(p) * weight, penalties)
    return (waiting, jax.lax.ppermute(y, schedule.axis, around)), penalties

  start = (xs, jnp.zeros_like(xs[0]))
  (waiting, arriving), penalties = jax.lax.scan(tick, start, jnp.arange(schedule.ticks))
  ys = keep(waiting, arriving, schedule.ticks)

  def total(y):
    return jax.lax.psum(y, schedule.axis)

  penalties = jax.tree.map(lambda p: total(jnp.sum(p)), penalties)
  return total(jnp.where(stage == 0, ys, 0)), penalties


def _weights(rows: dict, n: int) -> jax.Array:
  """Returns the fraction of the tokens in each microbatch, [microbatches]."""
  if 'segments' not in rows:
    return jnp.full(n, 1 / n)
  tokens = jnp.sum(rows['segments'] > 0, axis=(1, 2), dtype=jnp.float32)
  return tokens / jnp.maximum(jnp.sum(tokens), 1.0)


def _blocks(schedule: Schedule, stage, w: jax.Array) -> jax.Array:
  """Returns the blocks of a stage, [rounds, layers of a block, ...], from consecutive parts of the layers."""
  stages = schedule.stages
  rounds = schedule.rounds
  w = w.reshape(rounds, -1, *w.shape[1:], out_sharding=jax.P(None, None, *axes_of(w)[1:]))
  if rounds == 1:
    return w
  # An all_to_all needs equal parts: every stage sends `width` blocks to every stage, though some are not
  # needed. `send[s, t]` are the blocks that stage s sends to stage t, `take[t]` the entries that stage t needs,
  # by round.
  width = -(-rounds // stages)
  send = np.zeros((stages, stages, width), np.int32)
  take = np.zeros((stages, rounds), np.int32)
  used = np.zeros((stages, stages), np.int32)
  for number in range(stages * rounds):
    source, i = divmod(number, rounds)
    turn, target = divmod(number, stages)
    slot = used[source, target]
    send[source, target, slot] = i
    take[target, turn] = source * width + slot
    used[source, target] += 1
  w = jnp.take(w, jnp.asarray(send)[stage].reshape(-1), axis=0)
  w = jax.lax.all_to_all(w, schedule.axis, 0, 0, tiled=True)
  return jnp.take(w, jnp.asarray(take)[stage], axis=0)
