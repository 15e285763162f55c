"""Several answers to each of many prompts, drawn at once in one compiled loop: rollouts, best-of-n.

`engine.Engine` answers requests as they come. Here all prompts are known, and so the whole is one program: each
prompt is read once, its row is repeated for its answers, and a step draws a token for every row.
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

PROMPT_STEP = 8  # prompts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Answers [rows, most], the answers to one prompt side by side, as host arrays.

  Attributes:
    tokens: 0 after the end.
    mask: 1 on the tokens of the answer, its stop included.
    log_probs: of the tokens by softmax(logits / temperature), before any filter.
    entropy: of that distribution before each token, in nats.
    kept: the probability that the filters left at each token.
    stopped: [rows], whether a stop token ended the answer.
  """

  tokens: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  entropy: np.ndarray
  kept: np.ndarray
  stopped: np.ndarray


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
) -> Drawn:
  """Draws answers under the mesh in use.

  Args:
    prompts: token ids, with what stands before the first.
    seeds: [prompts, answers], each below 2^31; an answer depends on its prompt and its seed alone.
    settings: temperature (above 0) and filters; its seed is not used.
    most: tokens of an answer.
    room: tokens of a prompt and its answer.
    stops: ids that end an answer.
  """
  graph, params = decode.for_backend(graphdef, params)
  length = min(-(-max(map(len, prompts)) // PROMPT_STEP) * PROMPT_STEP, room)
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
  """The fields of `Drawn`."""
  model = merge(graphdef, params)
  logits, cache = decode.prefill(model, batch, room)
  logits = jnp.repeat(logits, answers, 0, out_sharding=spec_of(logits))
  count = logits.shape[0]
  said = {
    'tokens': jnp.zeros((count, most), jnp.int32),
    'mask': jnp.zeros((count, most), jnp.int32),
    **{name: jnp.zeros((count, most)) for name in ('log_probs', 'entropy', 'kept')},
  }
  loop = {
    'number': jnp.zeros((), jnp.int32),
    'logits': logits.astype(jnp.float32),
    'cache': decode.repeat(cache, answers),
    'ended': jnp.zeros(count, bool),
    'said': said,
  }

  def go_on(loop):
    return (loop['number'] < most) & ~jnp.all(loop['ended'])

  def one_token(loop):
    number, ended = loop['number'], loop['ended']
    chosen = _choose(shard(loop['logits'], None, None), rows, number, filters)
    chosen['tokens'] = jnp.where(ended, 0, chosen['tokens'])
    chosen['mask'] = (~ended).astype(jnp.int32)

    def put(said, new):
      new = jnp.where(ended, 0, new).astype(said.dtype)
      return jax.lax.dynamic_update_index_in_dim(said, new, number, 1)

    said = {name: put(loop['said'][name], chosen[name]) for name in loop['said']}
    ended = ended | jnp.any(chosen['tokens'][:, None] == stops, axis=1)
    tokens = shard(chosen['tokens'][:, None], 'batch', None)
    logits, cache = decode.step(model, tokens, loop['cache'])
    logits = logits[:, 0].astype(jnp.float32)
    return {'number': number + 1, 'logits': logits, 'cache': cache, 'ended': ended, 'said': said}

  loop = jax.lax.while_loop(go_on, one_token, loop)
  return {**loop['said'], 'stopped': loop['ended']}


def _choose(logits: jax.Array, rows: dict, number: jax.Array, filters: bool) -> dict:
  """The next token of every row, and what the policy said of it, [rows] each."""
  log_p = jax.nn.log_softmax(logits / rows['temperature'][:, None], axis=-1)
  filtered = sampling.distribution(logits, rows, filters)
  tokens = sampling.draw(filtered, rows['seed'], jnp.full(len(logits), number))
  p = jnp.exp(log_p)
  return {
    'tokens': tokens,
    'log_probs': jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0],
    # A token of probability 0 adds nothing, and not 0 x infinity.
    'entropy': -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1),
    'kept': jnp.sum(jnp.where(jnp.isfinite(filtered), p, 0.0), axis=-1),
  }
