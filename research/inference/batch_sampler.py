"""Draws several answers to each of many prompts in one compiled loop, for rollouts and best-of-n.

`engine.Engine` answers requests as they arrive. Here all prompts are known at the start, so everything is one
program: it reads every prompt once, repeats its row for its answers, and draws a token for every row in each
step.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.inference import decode, sampling
from research.inference.graph import Graph, graph_of, merge
from research.inference.sampling import Sampling
from research.parallel import hosts
from research.parallel.axes import shard, spec_of

PROMPT_STEP = 8  # prompts are padded to a multiple of this, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Answers as host arrays [rows, most]. The answers to one prompt are consecutive rows.

  Attributes:
    tokens: the tokens, 0 after the end.
    mask: 1 for the tokens of the answer, its stop token included.
    log_probs: the tokens' log-probabilities by softmax(logits / temperature), before any filter.
    entropy: the entropy of that distribution at each token, in nats.
    kept: the probability of all tokens that pass the filters, at each token.
    stopped: [rows], whether a stop token ended the answer.
  """

  tokens: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  entropy: np.ndarray
  kept: np.ndarray
  stopped: np.ndarray


def padded_length(prompts: Sequence[Sequence[int]], room: int) -> int:
  """Returns the length to which `draw_answers` pads these prompts."""
  return min(-(-max(map(len, prompts)) // PROMPT_STEP) * PROMPT_STEP, room)


def draw_answers(
  graphdef: nnx.GraphDef,
  params: dict,
  prompts: Sequence[Sequence[int]],
  seeds: np.ndarray,
  settings: Sampling,
  *,
  most: int,
  room: int,
  stops: Sequence[int],
  length: int = 0,
) -> Drawn:
  """Draws answers, under the mesh in use.

  Args:
    graphdef: the structure of the model.
    params: its parameters.
    prompts: token ids, with the ids that the tokenizer puts before a text.
    seeds: [prompts, answers], each below 2^31. An answer depends only on its prompt and its seed.
    settings: temperature (above 0) and filters; its seed is not used.
    most: the most tokens of an answer.
    room: the most tokens of a prompt and its answer.
    stops: ids that end an answer.
    length: to which prompts are padded; 0 is `padded_length`.
  """
  graph, params = decode.for_backend(graphdef, params)
  length = length or padded_length(prompts, room)
  tokens, real = np.zeros((2, len(prompts), length), np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)] = prompt
    real[i, : len(prompt)] = 1
  batch = hosts.place({'decoder_input_tokens': tokens, 'decoder_segment_ids': real})
  rows = sampling.as_rows([settings] * seeds.size) | {'seed': seeds.reshape(-1).astype(np.int32)}
  drawn = _draw(
    graph_of(graph), params, batch, rows, np.asarray(stops, np.int32),
    answers=seeds.shape[1], most=most, room=room, filters=settings.filters,
  )  # fmt: skip
  return Drawn(**{name: np.asarray(value) for name, value in jax.device_get(drawn).items()})


@functools.partial(jax.jit, static_argnames=('graphdef', 'answers', 'most', 'room', 'filters'))
def _draw(
  graphdef: Graph | nnx.GraphDef,
  params: dict,
  batch: dict,
  rows: dict,
  stops: jax.Array,
  *,
  answers: int,
  most: int,
  room: int,
  filters: bool,
) -> dict[str, jax.Array]:
  """Returns the fields of `Drawn`, on the devices."""
  model = merge(graphdef, params)
  logits, cache = decode.prefill(model, batch, room)
  logits = jnp.repeat(logits, answers, 0, out_sharding=spec_of(logits))
  count = logits.shape[0]
  results = _empty(count, most)
  loop = {
    'number': jnp.zeros((), jnp.int32),
    'logits': logits.astype(jnp.float32),
    'cache': decode.repeat(cache, answers),
    'ended': jnp.zeros(count, bool),
    'results': results,
  }

  def unfinished(loop):
    return (loop['number'] < most) & ~jnp.all(loop['ended'])

  def one_token(loop):
    number, ended = loop['number'], loop['ended']
    # Every device draws for all rows, so that a token does not depend on the mesh.
    chosen = _choose(shard(loop['logits'], None, None), rows, number, filters)
    chosen['tokens'] = jnp.where(ended, 0, chosen['tokens'])
    chosen['mask'] = (~ended).astype(jnp.int32)

    def put(results, new):
      new = jnp.where(ended, 0, new).astype(results.dtype)
      return jax.lax.dynamic_update_index_in_dim(results, new, number, 1)

    results = {name: put(loop['results'][name], chosen[name]) for name in loop['results']}
    ended = ended | jnp.any(chosen['tokens'][:, None] == stops, axis=1)
    tokens = shard(chosen['tokens'][:, None], 'batch', None)
    logits, cache = decode.step(model, tokens, loop['cache'])
    logits = logits[:, 0].astype(jnp.float32)
    return {
      'number': number + 1,
      'logits': logits,
      'cache': cache,
      'ended': ended,
      'results': results,
    }

  loop = jax.lax.while_loop(unfinished, one_token, loop)
  return {**loop['results'], 'stopped': loop['ended']}


def _empty(rows: int, most: int) -> dict[str, jax.Array]:
  """Returns zeros for every field of `Drawn` but `stopped`, [rows, most]."""
  drawn = {name: jnp.zeros((rows, most), jnp.int32) for name in ('tokens', 'mask')}
  return drawn | {name: jnp.zeros((rows, most)) for name in ('log_probs', 'entropy', 'kept')}


def _choose(logits: jax.Array, rows: dict, number: jax.Array, filters: bool) -> dict:
  """Draws the next token of every row; returns fields of `Drawn`, [rows] each."""
  log_p = jax.nn.log_softmax(logits / rows['temperature'][:, None], axis=-1)
  filtered = sampling.distribution(logits, rows, filters)
  tokens = sampling.draw(filtered, rows['seed'], jnp.full(len(logits), number))
  p = jnp.exp(log_p)
  return {
    'tokens': tokens,
    'log_probs': jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0],
    # A token of probability 0 adds 0, and not 0 x infinity.
    'entropy': -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1),
    'kept': jnp.sum(jnp.where(jnp.isfinite(filtered), p, 0.0), axis=-1),
  }
