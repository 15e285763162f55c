"""The compiled functions of evaluation: whole rows, and continuations after contexts that were read once."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from research.inference import decode
from research.inference.decode import Cache
from research.inference.state import State
from research.parallel.axes import axes_of, spec_of
from research.training.cross_entropy import default_chunks, token_losses

# The model's graph is a static argument, so that all engines of a model share a program.
compiled_once = functools.partial(jax.jit, static_argnums=0)


@compiled_once
def score(graphdef: nnx.GraphDef, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
  """(nats of every target, whether the target is the likeliest token), both [batch, length]."""
  model = nnx.merge(graphdef, params)
  x, _ = model.features(batch)
  return _losses(model, x, batch['decoder_target_tokens'])


@compiled_once
def features(graphdef: nnx.GraphDef, params: dict, batch: dict) -> jax.Array:
  """The last features [batch, length, embed] before the head."""
  return nnx.merge(graphdef, params).features(batch)[0]


@functools.partial(jax.jit, static_argnums=0, static_argnames=('room', 'ahead'))
def read(
  graphdef: nnx.GraphDef, params: dict, batch: Mapping, *, room: int, ahead: int
) -> tuple[jax.Array, Cache]:
  """Reads contexts.

  Args:
    batch: of contexts, which says which tokens are padding.
    room: tokens that the cache has space for, those of a context and of what follows it.
    ahead: how many of them are read after the context.

  Returns:
    (ln p of every next token [contexts, vocab], the cache after each context).
  """
  logits, cache = decode.prefill(nnx.merge(graphdef, params), batch, room, ahead=ahead)
  return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), cache


@compiled_once
def score_after(
  graphdef: nnx.GraphDef, params: dict, cache: Cache, batch: Mapping
) -> tuple[jax.Array, jax.Array]:
  """`score` of tokens that follow contexts. The cache does not change.

  Args:
    cache: of `read`.
    batch: `decoder_input_tokens` and `decoder_target_tokens`, [rows, length]; 'contexts' [rows, 1], the number
      of the context that each row follows. Any number of rows may follow one context.
  """
  model = nnx.merge(graphdef, params)
  contexts = batch['contexts'][:, 0]

  def of_each_row(x):
    # A row may lie on another device than its context, so every device first gets all contexts.
    axes = axes_of(x)
    whole = x if axes[0] is None else jax.sharding.reshard(x, jax.P(None, *axes[1:]))
    return whole.at[contexts].get(out_sharding=spec_of(x))

  entries, length = jax.tree.map(of_each_row, (cache.entries, cache.length))
  tokens = batch['decoder_input_tokens']
  positions = length[:, None] + jnp.arange(tokens.shape[1])
  inputs = {'decoder_input_tokens': tokens, 'decoder_positions': positions}
  x, _ = model.features(inputs, State(cache.room, entries=entries))
  return _losses(model, x, batch['decoder_target_tokens'])


def _losses(model: nnx.Module, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """See `score`. Only a part of the length has its logits in memory at a time, as in training."""
  readout = model.readout()
  parts = default_chunks(*targets.shape, model.vocab)
  nats = []
  greedy = []
  x_parts = jnp.split(x, parts, axis=1)
  target_parts = jnp.split(targets, parts, axis=1)
  for x_part, target in zip(x_parts, target_parts, strict=True):
    logits = readout(x_part)
    nats.append(token_losses(logits, target, 0.0)[0])
    greedy.append(jnp.argmax(logits, axis=-1) == target)
  return jnp.concatenate(nats, axis=1), jnp.concatenate(greedy, axis=1)
