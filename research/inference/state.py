"""What a model keeps of the tokens that it has read, so that the next token need not read them again.

A part asks its context (`model.part.Context`), and in decoding a `State` answers:

- `recall`: arrays with an entry per token. They are kept in slots, and a token's slot is its position modulo
  the number of slots. A sliding window so needs only as many slots as it sees, and each row may be at a
  position of its own.
- `carry`: the state of a recurrence.
- `once`: arrays that only the first call computes, such as the encoder's keys.

The first call makes an entry for each question, in the order in which the parts ask. Later calls find the
entries in the same order and leave new ones. Every array of an entry is [batch, layers, ...]: rows can be
picked, repeated and replaced, and a scanned stack changes its layer's part in place. Slots are the last axis
but one, which is the order that a CPU's matrix products read fastest.

Prompts are padded on the left, so that the newest token of every row is its last.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.model.part import Context
from research.parallel.axes import axes_of


class Rounded(NamedTuple):
  """An array in int8 with one scale for each last axis, whose largest value is 127 times the scale."""

  values: jax.Array
  scale: jax.Array

  @classmethod
  def of(cls, x: jax.Array) -> 'Rounded':
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    # A token whose entry is all zeros has no scale; any would do.
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return cls(values, scale)

  def array(self) -> jax.Array:
    return self.values.astype(self.scale.dtype) * self.scale


class State:
  """Answers the parts of a model during one call (`model.part.DecodingState`).

  Args:
    room: the most tokens of a row.
    ahead: the most tokens of a later call; a sliding window keeps so many slots more, less one.
    int8: whether `recall` keeps its arrays as `Rounded`.
    entries: what the call before left; None in the first call.
    layer: whose turn it is, among the layers that the entries are of.
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
    self.room, self.ahead, self.int8, self.layer = room, ahead, int8, layer
    self.first = entries is None
    self.asked = 0
    self.carries = False  # whether any part has a recurrence
    self._old = entries or ()
    self._new: list = []

  def close(self) -> tuple:
    """The entries for the next call.

    Raises:
      UserError: the parts asked less often than in the first call.
    """
    if not self.first and self.asked != len(self._old):
      raise UserError(
        f'the model asked {self.asked} times for what it keeps, and {len(self._old)} times when it read the '
        'prompt; what a part asks its context must not depend on the call.'
      )
    return tuple(self._new)

  def recall(self, new: tuple, context: Context, window: int | None) -> tuple:
    """See `Context.recall`."""
    positions, length = _whole(context.positions), new[0].shape[1]
    last = positions[:, -1:]
    if self.first:
      slots = self.room if window is None else min(self.room, window + self.ahead - 1)
      # The token of each slot, by its place in the padded prompt; slots that are empty hold anything.
      places = jnp.maximum(_newest(last, slots) - last + length - 1, 0)
      kept = tuple(map(Rounded.of, new)) if self.int8 else new
      self._make(jax.tree.map(lambda x: jnp.moveaxis(pick(_whole(x), places), 1, -2), kept))
      return *new, context
    entry = self._next()
    slots = jax.tree.leaves(entry)[0].shape[-2]
    new = tuple(map(Rounded.of, new)) if isinstance(entry[0], Rounded) else new

    def put(kept, x, slot):  # of one row: [layers, ..., slots, n], [length, ..., n], [length]
      between = [slice(None)] * (kept.ndim - 3)
      return kept.at[(self.layer, *between, slot)].set(x.astype(kept.dtype))

    # `vmap` over rows, or jax gathers the whole cache on a mesh.
    entry = jax.tree.map(
      lambda kept, x: jax.vmap(put)(kept, _whole(x), positions % slots), entry, new
    )
    self._new.append(entry)
    arrays = (x.array() if isinstance(x, Rounded) else x for x in self._of_layer(entry))
    arrays = (jnp.moveaxis(x, -2, 1) for x in arrays)
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

    def put(kept, x):
      return jax.lax.dynamic_update_index_in_dim(kept, x.astype(kept.dtype), self.layer, 1)

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
    """x after all the layers of a stack, in a loop.

    Args:
      layer: `layer(x, parameters, state) -> x`.
      x: [batch, length, embed].
      stacked: the parameters, [layers, ...].
    """

    def one(loop, inputs):
      (x, entries), (number, parameters) = loop, inputs
      state = State(self.room, self.ahead, int8=self.int8, entries=entries, layer=number)
      x = layer(x, parameters, state)
      left = state.close()
      self.carries |= state.carries
      return ((x, None), left) if self.first else ((x, left), None)

    layers = jnp.arange(jax.tree.leaves(stacked)[0].shape[0])
    # The entries are what the loop carries, not its inputs and outputs: those would be copied in every call.
    start = x, None if self.first else self._next()
    (x, changed), made = jax.lax.scan(one, start, (layers, stacked))
    if self.first:
      self.asked += 1
      # [layers, batch, 1, ...] to [batch, layers, ...]
      changed = jax.tree.map(lambda x: jnp.swapaxes(x[:, :, 0], 0, 1), made)
    self._new.append(changed)
    return x

  def _next(self):
    """The entry whose turn it is."""
    if self.asked >= len(self._old):
      raise UserError(
        f'the model asks more than the {len(self._old)} times that it asked when it read the prompt; what a '
        'part asks its context must not depend on the call.'
      )
    self.asked += 1
    return self._old[self.asked - 1]

  def _make(self, entry) -> None:
    self.asked += 1
    self._new.append(jax.tree.map(lambda x: x[:, None], entry))

  def _of_layer(self, entry):
    def part(x):
      return jax.lax.dynamic_index_in_dim(x, self.layer, 1, keepdims=False)

    return jax.tree.map(part, entry)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[b, index[b]] for every row b: a gather that stays on the device of the row."""
  return jax.vmap(lambda x, i: x[i])(x, index)


def _newest(last: jax.Array, slots: int) -> jax.Array:
  """[batch, slots]: the newest position of each slot, by a row's last [batch, 1]; negative if there is none."""
  return last - (last - jnp.arange(slots)) % slots


def _whole(x: jax.Array) -> jax.Array:
  """[batch, length, ...] with its length on every device."""
  where = axes_of(x)
  return x if where[1] is None else jax.sharding.reshard(x, jax.P(where[0], None, *where[2:]))
