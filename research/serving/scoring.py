"""Reads whole texts: the log-probabilities of their tokens, and their embeddings."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.evaluation import programs
from research.inference.padding import for_mesh, padded_length, padded_rows
from research.parallel.axes import shard
from research.training.cross_entropy import default_chunks


class Scores(NamedTuple):
  """Scores of every token of a text but the first.

  Attributes:
    logprobs: [tokens - 1], the log-probability of each token.
    top: the likeliest tokens at each place, as (id, log-probability), the likeliest first.
  """

  logprobs: list[float]
  top: list[list[tuple[int, float]]]


def score(
  graphdef: nnx.GraphDef, params: dict, tokens: Sequence[int], top: int, room: int
) -> Scores:
  """Returns log-probabilities (natural logarithms) by the model alone, without temperature or filters.

  Args:
    graphdef: the structure of a decoder.
    params: its parameters.
    tokens: the text.
    top: how many of the likeliest tokens are reported at each place.
    room: the most tokens of a text.
  """
  length = padded_length(len(tokens), room)
  targets = np.zeros((1, length), np.int32)
  targets[0, : len(tokens) - 1] = tokens[1:]
  batch = for_mesh({**padded_rows('decoder', [tokens], length), 'decoder_target_tokens': targets})
  host = jax.device_get(_score(graphdef, params, batch, top=top))
  logprobs, top_tokens, top_logprobs = (x[0, : len(tokens) - 1] for x in host)
  pairs = [
    [(int(t), float(p)) for t, p in zip(ids, values, strict=True)]
    for ids, values in zip(top_tokens, top_logprobs, strict=True)
  ]
  return Scores([float(p) for p in logprobs], pairs)


@functools.partial(jax.jit, static_argnames=('graphdef', 'top'))
def _score(graphdef: nnx.GraphDef, params: dict, batch: dict, *, top: int):
  """Returns the log-probabilities of the targets [rows, length], and the likeliest tokens and their
  log-probabilities [rows, length, top]."""
  model = nnx.merge(graphdef, params)
  targets = batch['decoder_target_tokens']
  x, _ = model.features(batch)
  # The length goes in parts, because the logits of a large vocabulary need much memory.
  parts = default_chunks(*targets.shape, model.vocab)
  results = []
  for x_part, target in zip(
    jnp.split(x, parts, axis=1), jnp.split(targets, parts, axis=1), strict=True
  ):
    # `take_along_axis` and `top_k` need all logits of a token on one device.
    logits = shard(model.logits(x_part).astype(jnp.float32), None, None, None)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(log_p, top)
    target_log_p = jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    results.append((target_log_p, ids, values))
  return tuple(jnp.concatenate(x, axis=1) for x in zip(*results, strict=True))


def embed(graphdef: nnx.GraphDef, params: dict, tokens: Sequence[int], room: int) -> np.ndarray:
  """Returns a text's embedding, float32 [embed] of length 1: the mean of the last layer's features."""
  batch = for_mesh(padded_rows('decoder', [tokens], padded_length(len(tokens), room)))
  x = jax.device_get(programs.features(graphdef, params, batch))
  # Of the padded tokens only the real ones count. The mean of many float32 numbers is taken in float64.
  mean = np.asarray(x[0, : len(tokens)], np.float64).mean(0)
  return (mean / np.linalg.norm(mean)).astype(np.float32)
