"""A model reads prompts once (`prefill`) and then a few tokens a step (`step`): all that decoding is made of.

Both are pure functions to be compiled by the caller. The cache between them is a tree of arrays [batch, ...];
a caller who compiles `step` donates it, so that it is changed in place.
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
from research.parallel.mesh import Mesh


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('entries', 'length'),
  meta_fields=('room', 'forgets'),
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a model keeps of the tokens that it has read.

  Attributes:
    entries: arrays [batch, ...], as `State.close` gives them.
    length: [batch], the tokens of each row, which is the position of its next.
    room: the most tokens of a row.
    forgets: whether a row's newest tokens can be taken back by making `length` smaller (no recurrence).
  """

  entries: tuple
  length: jax.Array
  room: int
  forgets: bool = True


def check_decodes(model: nnx.Module) -> None:
  """Raises where a model cannot decode as a whole, or not on the mesh in use."""
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
    batch: as for training, a prompt in each row, padded (`decoder_segment_ids` 0) before or behind it.
    room: the most tokens of a row, the prompt's included.
    ahead: the most tokens of one later step.
    int8: keys and values are kept as whole numbers.

  Returns:
    The logits [batch, vocab] after each prompt, and the cache.

  Raises:
    UserError: the prompts are longer than the room; a part of the model cannot decode.
  """
  check_decodes(model)
  ours = {k: shard(x, 'batch', None) for k, x in batch.items() if k.startswith('decoder_')}
  tokens = ours['decoder_input_tokens']
  if tokens.shape[1] > room:
    raise UserError(f'prompts of {tokens.shape[1]} tokens do not fit into a room of {room}.')
  real = ours.get('decoder_segment_ids', jnp.ones_like(tokens)) > 0
  order = jnp.argsort(real, axis=1, stable=True)  # padding first
  ours = {k: pick(x, order) for k, x in ours.items()}
  length = jnp.sum(real, axis=1, dtype=jnp.int32)
  places = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - length)[:, None]
  ours['decoder_positions'] = jnp.maximum(places, 0)
  ours = {k: shard(x, 'batch', 'length') for k, x in ours.items()}
  state = State(room, ahead, int8=int8)
  x, _ = model.features({**batch, **ours}, state)
  x = shard(x, 'batch', None, None)[:, -1:]
  return model.logits(x)[:, 0], Cache(state.close(), length, room, not state.carries)


def step(model: nnx.Module, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
  """Reads the next tokens of every row.

  Args:
    tokens: [batch, length], at most as many as `prefill` was told by `ahead`.

  Returns:
    The logits [batch, length, vocab] after each of them, and the cache. The logits of a position past the
    room are NaN: its token took the slot of an earlier one.
  """
  positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
  state = State(cache.room, entries=cache.entries)
  batch = {'decoder_input_tokens': tokens, 'decoder_positions': positions}
  x, _ = model.features(batch, state)
  logits = jnp.where((positions < cache.room)[..., None], model.logits(x), jnp.nan)
  length = cache.length + tokens.shape[1]
  return logits, Cache(state.close(), length, cache.room, cache.forgets)


def separated(graphdef: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, dict]:
  """The same model with parameters of its own for every layer, and matrices kept by output (`ByOutput`).

  XLA on a CPU copies what it slices from stacked parameters, so that a step would write and read all of the
  parameters once more. Where a model is in this form already, nothing happens. The parameters are copied.
  """
  abstract = jax.eval_shape(functools.partial(_suited, graphdef), params)
  new = nnx.graphdef(abstract)
  return (graphdef, params) if new == graphdef else (new, _separate(graphdef, params))


def for_backend(graphdef: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, dict]:
  """The model as it decodes fastest here: on a CPU `separated`, elsewhere as it is."""
  return separated(graphdef, params) if jax.default_backend() == 'cpu' else (graphdef, params)


def suit_cpu(model: nnx.Module) -> None:
  """Gives a model the form that `separated` describes. Call it outside of the step."""
  separate_layers(model)
  turn_matrices(model)


def _suited(graphdef: nnx.GraphDef, params: dict) -> nnx.Module:
  model = nnx.merge(graphdef, params)
  suit_cpu(model)
  return model


@functools.partial(jax.jit, static_argnames='graphdef')
def _separate(graphdef: nnx.GraphDef, params: dict) -> dict:
  return nnx.to_pure_dict(nnx.state(_suited(graphdef, params)))


def insert(cache: Cache, other: Cache, row: jax.Array | int) -> Cache:
  """The cache with the rows of another in place of its own, from `row` on."""

  def put(x, y):
    return jax.lax.dynamic_update_slice_in_dim(x, y, row, 0)

  return jax.tree.map(put, cache, other)


def repeat(cache: Cache, times: int) -> Cache:
  """The cache with every row so many times, one after another."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, 0, out_sharding=spec_of(x)), cache)
