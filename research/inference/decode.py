"""Decoding: a model reads prompts once (`prefill`) and then a few tokens per step (`step`).

Both are pure functions that the caller compiles. The cache between them is a tree of arrays [batch, ...]. A
caller that compiles `step` donates the cache, so that it is updated in place.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid, UserError
from research.inference.by_output import turn_matrices
from research.inference.state import State, pick
from research.model.stack import separate_layers
from research.parallel.axes import axis_size, shard, spec_of
from research.parallel.mesh import Mesh, platform


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('entries', 'length'),
  meta_fields=('room', 'forgets'),
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a model keeps of the tokens that it has read, such as keys and values.

  Attributes:
    entries: arrays [batch, ...], as `State.close` returns them.
    length: [batch], the number of tokens of each row, which is the position of its next token.
    room: the most tokens of a row.
    forgets: True if a smaller `length` takes back a row's newest tokens. A recurrence cannot do that.
  """

  entries: tuple
  length: jax.Array
  room: int
  forgets: bool = True


def check_decodes(model: nnx.Module) -> None:
  """Raises UserError if a model cannot decode at all, or not on the mesh in use."""
  if not getattr(model, 'causal', True):
    raise UserError(
      'this model sees both ways, so it does not generate text: use a decoder or an encoder-decoder.'
    )
  for name, axis in (('length', 'context'), ('layers', 'stage')):
    if axis_size(name) > 1:
      why = f'decoding does not split {name} over devices; set Mesh.{axis} to 1.'
      raise Invalid(Mesh, axis, why)


def prefill(
  model: nnx.Module,
  batch: Mapping[str, jax.Array],
  room: int,
  *,
  ahead: int = 1,
  int8: bool = False,
) -> tuple[jax.Array, Cache]:
  """Reads the prompts.

  Args:
    model: a decoder or an encoder-decoder.
    batch: as in training, with a prompt in each row, padded (`decoder_segment_ids` 0) before or after it.
    room: the most tokens of a row, its prompt included.
    ahead: the most tokens of a later step.
    int8: stores keys and values in int8.

  Returns:
    The logits [batch, vocab] after each prompt, and the cache.

  Raises:
    UserError: the prompts are longer than the room, or a part of the model cannot decode.
  """
  check_decodes(model)
  decoder = {k: shard(x, 'batch', None) for k, x in batch.items() if k.startswith('decoder_')}
  tokens = decoder['decoder_input_tokens']
  if tokens.shape[1] > room:
    raise UserError(
      f'prompts of {tokens.shape[1]} tokens do not fit into a room of {room}; shorten them or raise the room.'
    )
  real = decoder.get('decoder_segment_ids', jnp.ones_like(tokens)) > 0
  # Padding first, so that the newest token of every row is its last one.
  order = jnp.argsort(real, axis=1, stable=True)
  decoder = {k: pick(x, order) for k, x in decoder.items()}
  length = jnp.sum(real, axis=1, dtype=jnp.int32)
  places = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - length)[:, None]
  decoder['decoder_positions'] = jnp.maximum(places, 0)
  decoder = {k: shard(x, 'batch', 'length') for k, x in decoder.items()}
  state = State(room, ahead, int8=int8)
  x, _ = model.features({**batch, **decoder}, state)
  # Logits of the last token only: those of whole prompts would need much memory.
  x = shard(x, 'batch', None, None)[:, -1:]
  return model.logits(x)[:, 0], Cache(state.close(), length, room, not state.carries)


def step(model: nnx.Module, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
  """Reads the next tokens of every row.

  Args:
    model: as for `prefill`.
    tokens: [batch, length], at most as many as `ahead` of `prefill`.
    cache: from the call before.

  Returns:
    The logits [batch, length, vocab] after each token, and the new cache. The logits of a position beyond the
    room are NaN, since its token overwrote the slot of an earlier one.
  """
  positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
  state = State(cache.room, entries=cache.entries)
  batch = {'decoder_input_tokens': tokens, 'decoder_positions': positions}
  x, _ = model.features(batch, state)
  logits = jnp.where((positions < cache.room)[..., None], model.logits(x), jnp.nan)
  length = cache.length + tokens.shape[1]
  return logits, Cache(state.close(), length, cache.room, cache.forgets)


def separated(graphdef: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, dict]:
  """Returns the same model with separate parameters for every layer, and matrices stored by output
  (`ByOutput`).

  XLA on a CPU copies the slices of stacked parameters, so a step would write and read all parameters once more.
  The parameters are copied here, unless the model has this form already.
  """
  new, _ = jax.eval_shape(functools.partial(_suited, graphdef), params)
  return (graphdef, params) if new == graphdef else (new, _separate(graphdef, params))


def for_backend(graphdef: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, dict]:
  """Returns the model in the form that decodes fastest: on a CPU `separated`, otherwise unchanged."""
  return separated(graphdef, params) if platform() == 'cpu' else (graphdef, params)


def suit_cpu(model: nnx.Module) -> None:
  """Changes a model to the form that `separated` describes. Call it outside of the step."""
  separate_layers(model)
  turn_matrices(model)


def _suited(graphdef: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, nnx.State]:
  model = nnx.merge(graphdef, params)
  suit_cpu(model)
  # Split here: a model that leaves a transformed function forgets that its modules share parameters.
  return nnx.split(model)


@functools.partial(jax.jit, static_argnames='graphdef')
def _separate(graphdef: nnx.GraphDef, params: dict) -> dict:
  return nnx.to_pure_dict(_suited(graphdef, params)[1])


def insert(cache: Cache, other: Cache, row: jax.Array | int) -> Cache:
  """Returns the cache with its row number `row` replaced by another cache of one row.

  Where the mesh splits rows over n devices, the other cache has n copies of that row (`padding.for_mesh`).
  """

  def put(x, y):
    if len(y) == 1:
      return jax.lax.dynamic_update_slice_in_dim(x, y, row, 0)
    # Each device compares the numbers of its own rows. The update above would gather the whole cache.
    numbers = shard(jnp.arange(len(x)), 'batch')
    copies = jnp.repeat(y, len(x) // len(y), 0, out_sharding=spec_of(y))
    return jax.vmap(replace)(numbers, x, copies)

  def replace(number, old, new):
    return jnp.where(number == row, new, old)

  return jax.tree.map(put, cache, other)


def repeat(cache: Cache, times: int) -> Cache:
  """Returns the cache with every row repeated, the copies side by side."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, 0, out_sharding=spec_of(x)), cache)
