"""Texts that are read as a whole: how likely their tokens are, and where they lie."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.evaluation import programs
from research.inference.padding import for_mesh, padded_length, padded_row
from research.parallel.axes import shard
from research.training.cross_entropy import default_chunks


class Scores(NamedTuple):
  """Of each token of a text but the first: its log-probability, and the likeliest tokens at its place.

  Attributes:
    logprobs: [tokens - 1].
    top: for each, (id, log-probability), the likeliest first.
  """

  logprobs: list[float]
  top: list[list[tuple[int, float]]]


def score(
  graphdef: nnx.GraphDef, params: dict, tokens: Sequence[int], top: int, room: int
) -> Scores:
  """Log-probabilities by the model alone, natural logarithms."""
  length = padded_length(len(tokens), room)
  batch = padded_row('decoder', tokens, length)
  targets = np.zeros((1, length), np.int32)
  targets[0, : len(tokens) - 1] = tokens[1:]
  host = jax.device_get(_score(graphdef, params, batch, for_mesh(targets), top=top))
  logprobs, top_tokens, top_logprobs = (x[0, : len(tokens) - 1] for x in host)
  pairs = [
    [(int(t), float(p)) for t, p in zip(ids, values, strict=True)]
    for ids, values in zip(top_tokens, top_logprobs, strict=True)
  ]
  return Scores([float(p) for p in logprobs], pairs)


@functools.partial(jax.jit, static_argnames=('graphdef', 'top'))
def _score(graphdef: nnx.GraphDef, params: dict, batch: dict, targets: jax.Array, *, top: int):
  """(log-probabilities of the targets, the likeliest tokens, theirs), each [1, length, ...]."""
  model = nnx.merge(graphdef, params)
  x, _ = model.features(batch)
  # Logits exist for a part of the length at a time: of a large vocabulary they are many.
  parts = default_chunks(*targets.shape, model.vocab)
  told = []
  for x_part, target in zip(
    jnp.split(x, parts, axis=1), jnp.split(targets, parts, axis=1), strict=True
  ):
    # On a mesh every device has all of a token's logits, so that one can be picked.
    logits = shard(model.logits(x_part).astype(jnp.float32), None, None, None)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(log_p, top)
    told.append((jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0], ids, values))
  return tuple(jnp.concatenate(x, axis=1) for x in zip(*told, strict=True))


def embed(graphdef: nnx.GraphDef, params: dict, tokens: Sequence[int], room: int) -> np.ndarray:
  """The mean of the last features over the tokens, scaled to length 1: float32 [embed]."""
  batch = padded_row('decoder', tokens, padded_length(len(tokens), room))
  x = jax.device_get(programs.features(graphdef, params, batch))
  mean = np.asarray(x[0, : len(tokens)], np.float64).mean(0)
  return (mean / np.linalg.norm(mean)).astype(np.float32)
