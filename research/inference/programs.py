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


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the requests at work need, so that nothing else is computed. A change compiles a new step.

  Attributes:
    draws, filters, penalises: whether any request does (`sampling.Sampling`).
    adjusts: whether any has a bias or a mask.
    top: how many of the likeliest tokens are told.
  """

  draws: bool = False
  filters: bool = False
  penalises: bool = False
  adjusts: bool = False
  top: int = 0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('logits', 'cache', 'seen', 'generated', 'number'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Slots:
  """All that an engine keeps on its devices, a row for each slot.

  Attributes:
    logits: [slots, vocab], for the next token of each.
    cache: what the model keeps.
    seen: [slots, vocab], whether a token occurred in the prompt or since.
    generated: [slots, vocab], how often it was generated.
    number: [slots], how many tokens were generated.
  """

  logits: jax.Array
  cache: Cache
  seen: jax.Array
  generated: jax.Array
  number: jax.Array


@functools.partial(jax.jit, static_argnames=('graphdef', 'room', 'ahead', 'int8'))
def read(
  graphdef: Graph | nnx.GraphDef, params: dict, batch: Mapping, *, room: int, ahead: int, int8: bool
) -> tuple[jax.Array, Cache]:
  """(logits after each prompt [rows, vocab], cache)."""
  logits, cache = decode.prefill(merge(graphdef, params), batch, room, ahead=ahead, int8=int8)
  return logits.astype(jnp.float32), cache


@functools.partial(jax.jit, static_argnames='graphdef', donate_argnames='cache')
def read_more(
  graphdef: Graph | nnx.GraphDef, params: dict, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """The same after another part [rows, length] of the prompts."""
  logits, cache = decode.step(merge(graphdef, params), tokens, cache)
  return logits[:, -1].astype(jnp.float32), cache


@functools.partial(jax.jit, donate_argnames='slots')
def admit(
  slots: Slots, slot: jax.Array, logits: jax.Array, cache: Cache, prompt_tokens: jax.Array
) -> Slots:
  """The slots with a request that was read in place of what was in one of them.

  Args:
    logits: [1, vocab].
    cache: of one row.
    prompt_tokens: [n], with -1 where there is none.
  """
  vocab = slots.seen.shape[-1]
  seen = (
    jnp.zeros(vocab, bool)
    .at[jnp.where(prompt_tokens < 0, vocab, prompt_tokens)]
    .set(True, mode='drop')
  )
  put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=slot, axis=0)
  return Slots(
    logits=put(slots.logits, logits[0]),
    cache=decode.insert(slots.cache, cache, slot),
    seen=put(slots.seen, seen),
    generated=put(slots.generated, jnp.zeros(vocab, slots.generated.dtype)),
    number=put(slots.number, jnp.zeros((), slots.number.dtype)),
  )


@functools.partial(jax.jit, static_argnames='plan')
def choose(
  slots: Slots, rows: Mapping[str, jax.Array], adjustment: jax.Array | None, *, plan: Plan
) -> dict[str, jax.Array]:
  """The next token of every slot.

  Args:
    rows: `sampling.as_rows`.
    adjustment: [slots, vocab] added to the logits (biases, and minus infinity for what a mask forbids).

  Returns:
    'tokens' [slots]; 'logprobs' [slots] of them by the model alone; 'top_tokens' and 'top_logprobs'
    [slots, top]; 'numbers' [slots], whether the logits were numbers.
  """
  raw = slots.logits
  log_p = jax.nn.log_softmax(raw, axis=-1)
  logits = raw
  if plan.penalises:
    logits = sampling.penalise(logits, rows, slots.seen, slots.generated)
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
  """The slots after a token each. A slot that is not active stays where it is, and what it computes is nothing.

  Args:
    tokens: [slots].
    active: [slots] bool.
    penalises: whether to keep count of the tokens.
  """
  logits, cache = decode.step(merge(graphdef, params), tokens[:, None], slots.cache)
  # An idle slot would walk past its room in time.
  cache = dataclasses.replace(cache, length=jnp.where(active, cache.length, 0))
  seen, generated = slots.seen, slots.generated
  if penalises:
    said = (tokens[:, None] == jnp.arange(seen.shape[-1])) & active[:, None]
    seen, generated = seen | said, generated + said
  return Slots(
    logits=logits[:, 0].astype(jnp.float32),
    cache=cache,
    seen=seen,
    generated=generated,
    number=slots.number + active,
  )
