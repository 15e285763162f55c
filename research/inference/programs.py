"""The compiled functions of an engine: read a prompt, put it into a slot, generate a token for every slot."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from research.inference import decode, sampling
from research.inference.decode import Cache
from research.inference.graph import Graph, merge
from research.parallel.axes import axes_of, axis_size, shard, spec


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the active requests need, so that a step computes nothing else. Every plan compiles a step of its own.

  Attributes:
    draws, filters, penalises: whether any request does so (`sampling.Sampling`).
    adjusts: whether any request has a bias or a mask.
    top: how many of the likeliest tokens are reported.
  """

  draws: bool = False
  filters: bool = False
  penalises: bool = False
  adjusts: bool = False
  top: int = 0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('logits', 'cache', 'occurred', 'generated', 'number'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Slots:
  """The arrays of an engine, with a row for each slot.

  A mesh splits the rows of the cache like those of a batch. The other arrays are small, so every device has
  them whole.

  Attributes:
    logits: [slots, vocab], for the next token.
    cache: the model's cache.
    occurred: [slots, vocab], whether a token occurred in the prompt or the answer.
    generated: [slots, vocab], how often a token was generated.
    number: [slots], how many tokens were generated.
  """

  logits: jax.Array
  cache: Cache
  occurred: jax.Array
  generated: jax.Array
  number: jax.Array


@functools.partial(jax.jit, static_argnames=('graphdef', 'room', 'ahead', 'int8'))
def read(
  graphdef: Graph | nnx.GraphDef, params: dict, batch: Mapping, *, room: int, ahead: int, int8: bool
) -> tuple[jax.Array, Cache]:
  """Reads prompts; returns the logits after each of them, [rows, vocab], and the cache."""
  logits, cache = decode.prefill(merge(graphdef, params), batch, room, ahead=ahead, int8=int8)
  if axis_size('batch') > 1:
    cache = jax.tree.map(_split_rows, cache)
  return _whole(logits), cache


def _split_rows(x: jax.Array) -> jax.Array:
  """Returns an array [rows, ...] with its rows split like those of a batch, however the model left them."""
  return jax.sharding.reshard(x, jax.P(*spec('batch'), *axes_of(x)[1:]))


@functools.partial(jax.jit, static_argnames='graphdef', donate_argnames='cache')
def read_more(
  graphdef: Graph | nnx.GraphDef, params: dict, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Reads another part of the prompts, tokens [rows, length]; returns logits and cache as `read` does."""
  logits, cache = decode.step(merge(graphdef, params), tokens, cache)
  return _whole(logits[:, -1]), cache


@jax.jit
def row(logits: jax.Array, cache: Cache, place: jax.Array) -> tuple[jax.Array, Cache]:
  """Returns the logits and the cache of one of several rows.

  Where the mesh splits rows over n devices, the cache has n copies of the row, as `admit` takes it.
  """
  copies = axis_size('batch')

  def take(x):
    axes = axes_of(x)
    # The index is the same everywhere, so every device needs all rows.
    whole = jax.sharding.reshard(x, jax.P(None, *axes[1:]))
    taken = jax.lax.dynamic_slice_in_dim(whole, place, 1, 0)
    return jnp.repeat(taken, copies, 0, out_sharding=jax.P(*axes))

  return jax.lax.dynamic_slice_in_dim(logits, place, 1, 0), jax.tree.map(take, cache)


def _whole(logits: jax.Array) -> jax.Array:
  """Returns logits [rows, vocab] in float32, whole on every device."""
  return shard(logits.astype(jnp.float32), None, None)


@functools.partial(jax.jit, donate_argnames='slots')
def admit(
  slots: Slots, slot: jax.Array, logits: jax.Array, cache: Cache, prompt_tokens: jax.Array
) -> Slots:
  """Puts a request whose prompt has been read into a slot.

  Args:
    slots: all slots.
    slot: the number of the slot.
    logits: [rows, vocab], after the prompt.
    cache: the prompt's cache, of one row or of equal rows (`decode.insert`).
    prompt_tokens: [n], padded with -1.
  """
  vocab = slots.occurred.shape[-1]
  occurred = (
    jnp.zeros(vocab, bool)
    .at[jnp.where(prompt_tokens < 0, vocab, prompt_tokens)]
    .set(True, mode='drop')
  )
  put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=slot, axis=0)
  return Slots(
    logits=put(slots.logits, logits[0]),
    cache=decode.insert(slots.cache, cache, slot),
    occurred=put(slots.occurred, occurred),
    generated=put(slots.generated, jnp.zeros(vocab, slots.generated.dtype)),
    number=put(slots.number, jnp.zeros((), slots.number.dtype)),
  )


@functools.partial(jax.jit, static_argnames='plan')
def choose(
  slots: Slots, rows: Mapping[str, jax.Array], adjustment: jax.Array | None, *, plan: Plan
) -> dict[str, jax.Array]:
  """Chooses the next token of every slot.

  Args:
    slots: all slots.
    rows: the settings of all slots, by `sampling.as_rows`.
    adjustment: [slots, vocab], added to the logits (biases, and minus infinity for tokens that a mask forbids).
    plan: what the active requests need.

  Returns:
    'tokens' [slots]; 'logprobs' [slots], their log-probabilities by the model itself; 'top_tokens' and
    'top_logprobs' [slots, top]; 'numbers' [slots], whether the logits are finite numbers.
  """
  raw = slots.logits
  log_p = jax.nn.log_softmax(raw, axis=-1)
  logits = raw
  if plan.penalises:
    logits = sampling.penalise(logits, rows, slots.occurred, slots.generated)
  if plan.adjusts:
    logits = logits + adjustment
  tokens = sampling.choose(logits, rows, slots.number, draws=plan.draws, filters=plan.filters)
  top_logprobs, top_tokens = jax.lax.top_k(log_p, plan.top)
  return {
    'tokens': tokens,
    'logprobs': jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0],
    'top_tokens': top_tokens,
    'top_logprobs': top_logprobs,
    'numbers': jnp.isfinite(jnp.max(logits, axis=-1)),
  }


@functools.partial(jax.jit, static_argnames=('graphdef', 'penalises'), donate_argnames='slots')
def advance(
  graphdef: Graph | nnx.GraphDef,
  params: dict,
  slots: Slots,
  tokens: jax.Array,
  active: jax.Array,
  *,
  penalises: bool,
) -> Slots:
  """Reads a token per slot; returns the slots after it. The values of a slot that is not active are
  meaningless.

  Args:
    graphdef: the structure of the model.
    params: its parameters.
    slots: all slots. Their memory is donated.
    tokens: [slots].
    active: [slots] bool.
    penalises: whether to count the tokens.
  """
  logits, cache = decode.step(merge(graphdef, params), tokens[:, None], slots.cache)
  # An idle slot stays at position 0. Otherwise it would pass the end of its room at some time.
  cache = dataclasses.replace(cache, length=jnp.where(shard(active, 'batch'), cache.length, 0))
  occurred, generated = slots.occurred, slots.generated
  if penalises:
    chosen = (tokens[:, None] == jnp.arange(occurred.shape[-1])) & active[:, None]
    occurred = occurred | chosen
    generated = generated + chosen
  return Slots(
    logits=_whole(logits[:, 0]),
    cache=cache,
    occurred=occurred,
    generated=generated,
    number=slots.number + active,
  )
