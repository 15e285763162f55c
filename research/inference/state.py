"""The cache of decoding: what a model keeps of the tokens it has read, so that it need not read them again.

A part calls the methods of its context (`model.part.Context`), and in decoding a `State` does the work:

- `recall`: arrays with an entry per token, such as keys. They are kept in slots. The slot of a token is its
  position modulo the number of slots. So a sliding window needs only as many slots as it sees, and every row
  may be at its own position.
- `carry`: the state of a recurrence.
- `once`: arrays that only the first call computes, such as the encoder's keys.

The first call makes an entry for each request of a part, in the order of the requests. Later calls find the
entries in the same order and replace them. Every array of an entry is [batch, layers, ...], so that rows can be
picked, repeated and replaced, and a scanned stack updates the part of its layer in place. `slots_axis` says
where the slots lie.

Prompts are padded on the left, so that the newest token of every row is its last.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.model.part import Context
from research.parallel.axes import axes_of, on_one_cpu
from research.parallel.mesh import platform


def slots_axis() -> int:
  """Returns the axis of slots in an array [batch, ...] of one layer, for the platform of the mesh in use.

  A CPU's matrix products read fastest with slots as the last axis but one. XLA for TPUs writes new tokens where
  slots come first; in any other order it copies the whole cache before and after.
  """
  return -2 if platform() == 'cpu' else 1


class Rounded(NamedTuple):
  """An array in int8, with a scale for every vector along its last axis: the largest value is 127 scales."""

  values: jax.Array
  scale: jax.Array

  @classmethod
  def from_array(cls, x: jax.Array) -> 'Rounded':
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    # The scale of a vector of zeros would be 0; any other number does as well.
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return cls(values, scale)

  def array(self) -> jax.Array:
    return self.values.astype(self.scale.dtype) * self.scale


class State:
  """The cache during one call of a model (`model.part.DecodingState`).

  Args:
    room: the most tokens of a row.
    ahead: the most tokens of a later call. A sliding window has `ahead` - 1 more slots: the oldest query of
      such a call needs keys that its newest token must not overwrite.
    int8: `recall` stores its arrays as `Rounded`.
    entries: from the call before; None in the first call.
    layer: the layer whose part of the entries is used.
  """

  def __init__(
    self,
    room: int,
    ahead: int = 1,
    *,
    int8: bool = False,
    entries: tuple | None = None,
    layer: int | jax.Array = 0,
  ):
    self.room = room
    self.ahead = ahead
    self.int8 = int8
    self.layer = layer
    self.first = entries is None
    self.requests = 0
    self.carries = False  # whether any part has a recurrence
    self._old = entries or ()
    self._new: list = []

  def close(self) -> tuple:
    """Returns the entries for the next call.

    Raises:
      UserError: the parts used the cache less often than in the first call.
    """
    if not self.first and self.requests != len(self._old):
      raise UserError(
        f'the model used its cache {self.requests} times, and {len(self._old)} times when it read the '
        'prompt; a part must use its context equally often in every call.'
      )
    return tuple(self._new)

  def recall(self, new: tuple, context: Context, window: int | None) -> tuple:
    """See `Context.recall`."""
    positions = _whole(context.positions)
    length = new[0].shape[1]
    last = positions[:, -1:]
    if self.first:
      slots = self.room if window is None else min(self.room, window + self.ahead - 1)
      # The token of each slot, by its place in the padded prompt. The values of empty slots are never seen.
      places = jnp.maximum(_newest(last, slots) - last + length - 1, 0)

      def to_slots(x):
        return jnp.moveaxis(pick(_whole(x), places), 1, slots_axis())

      stored = tuple(map(Rounded.from_array, new)) if self.int8 else new
      self._make(jax.tree.map(to_slots, stored))
      return *new, context
    entry = self._next()
    axis = slots_axis()  # also in a row of an entry, [layers, ...]
    slots = jax.tree.leaves(entry)[0].shape[1:][axis]
    new = tuple(map(Rounded.from_array, new)) if isinstance(entry[0], Rounded) else new

    def put_row(stored, x, slot):  # [layers, ...], [length, ..., n], [length]
      index = [slice(None)] * stored.ndim
      index[0] = self.layer
      if len(positions) == length == 1 and on_one_cpu():
        # XLA on a CPU makes an update of one token a part of what reads it, and so updates a copy of the cache
        # once more for the next step. An update of two tokens it leaves alone; the second is beyond the slots.
        slot = jnp.append(slot, slots)
        x = jnp.concatenate([x, x])
      index[axis] = slot
      return stored.at[tuple(index)].set(x.astype(stored.dtype), mode='drop')

    def put(stored, x):
      # `vmap` over rows, or jax gathers the whole cache on a mesh.
      return jax.vmap(put_row)(stored, _whole(x), positions % slots)

    entry = jax.tree.map(put, entry, new)
    self._new.append(entry)
    arrays = (x.array() if isinstance(x, Rounded) else x for x in self._of_layer(entry))
    arrays = (jnp.moveaxis(x, axis, 1) for x in arrays)
    return *arrays, dataclasses.replace(context, key_positions=_newest(last, slots))

  def carry(self, f: Callable, initial):
    """See `Context.carry`."""
    self.carries = True
    if self.first:
      state, y = f(initial)
      self._make(state)
      return y
    entry = self._next()
    state, y = f(self._of_layer(entry))

    def put(stored, x):
      return jax.lax.dynamic_update_index_in_dim(stored, x.astype(stored.dtype), self.layer, 1)

    self._new.append(jax.tree.map(put, entry, state))
    return y

  def once(self, arrays: tuple) -> tuple:
    """See `Context.once`."""
    if self.first:
      self._make(arrays)
      return arrays
    entry = self._next()
    self._new.append(entry)
    return self._of_layer(entry)

  def through_layers(self, layer: Callable, x: jax.Array, stacked) -> jax.Array:
    """Applies all layers of a stack to x, in a loop.

    Args:
      layer: `layer(x, parameters, state) -> x`.
      x: [batch, length, embed].
      stacked: the parameters, [layers, ...].
    """

    def one_layer(loop, inputs):
      (x, entries), (number, parameters) = loop, inputs
      state = State(self.room, self.ahead, int8=self.int8, entries=entries, layer=number)
      x = layer(x, parameters, state)
      new_entries = state.close()
      self.carries |= state.carries
      return ((x, None), new_entries) if self.first else ((x, new_entries), None)

    layers = jnp.arange(jax.tree.leaves(stacked)[0].shape[0])
    # The loop carries the entries. As its inputs and outputs they would be copied in every call.
    start = x, None if self.first else self._next()
    (x, entries), first_entries = jax.lax.scan(one_layer, start, (layers, stacked))
    if self.first:
      self.requests += 1
      # [layers, batch, 1, ...] to [batch, layers, ...]
      entries = jax.tree.map(lambda x: jnp.swapaxes(x[:, :, 0], 0, 1), first_entries)
    self._new.append(entries)
    return x

  def _next(self):
    """Returns the entry of the next request."""
    if self.requests >= len(self._old):
      raise UserError(
        f'the model uses its cache more than the {len(self._old)} times that it did when it read the prompt; '
        'a part must use its context equally often in every call.'
      )
    self.requests += 1
    return self._old[self.requests - 1]

  def _make(self, entry) -> None:
    """Stores the entry of a request of the first call, as that of one layer."""
    self.requests += 1
    self._new.append(jax.tree.map(lambda x: x[:, None], entry))

  def _of_layer(self, entry):
    """Returns the current layer's part of an entry."""

    def part(x):
      return jax.lax.dynamic_index_in_dim(x, self.layer, 1, keepdims=False)

    return jax.tree.map(part, entry)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns x[b, index[b]] for every row b, by a gather that stays on the device of the row."""
  return jax.vmap(lambda x, i: x[i])(x, index)


def _newest(last: jax.Array, slots: int) -> jax.Array:
  """Returns the newest position in each slot [batch, slots], by the last [batch, 1]; negative if empty."""
  return last - (last - jnp.arange(slots)) % slots


def _whole(x: jax.Array) -> jax.Array:
  """Gathers the length of x [batch, length, ...] to every device."""
  axes = axes_of(x)
  return x if axes[1] is None else jax.sharding.reshard(x, jax.P(axes[0], None, *axes[2:]))
