"""Beam search: the likeliest continuations of each prompt, as one compiled program."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import UserError
from research.inference import decode
from research.inference.state import pick
from research.parallel.axes import axes_of, spec, spec_of

NEVER = -1e9  # the score of a beam that there is not

# What the log-likelihood of a text of so many tokens is divided by.
Penalty = Callable[[float], float]


def by_length(length, *, power: float = 1.0):
  """length^power: the convention of transformers; the stop token counts."""
  return length**power


def wu(length, *, power: float = 0.6):
  """((5 + length) / 6)^power (Wu et al. 2016, arXiv:1609.08144, equation 14): the convention of T5X."""
  return ((5 + length) / 6) ** power


def beam_search(
  model: nnx.Module,
  batch: Mapping[str, jax.Array],
  max_tokens: int,
  *,
  beams: int,
  ends: Sequence[int],
  penalty: Penalty = by_length,
  patient: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The best continuations by log-likelihood / penalty(length).

  A prompt is done once its best open beam could not come among the finished ones if it ended now (the default
  of transformers), or, if `patient`, at the greatest length (T5X, and 'never' of transformers).

  Args:
    model, batch: as of `decode.prefill`.
    max_tokens: the most tokens of a continuation.
    beams: how many are followed, and returned.
    ends: ids that end a text.

  Returns:
    Tokens [batch, beams, max_tokens] with zeros behind the end, and scores [batch, beams], the best first.

  Raises:
    UserError: there are more beams than tokens in the vocabulary.
  """
  if not 1 <= beams <= model.vocab // 2:
    raise UserError(f'{beams} beams: choose from 1 to {model.vocab // 2}, half of the vocabulary.')
  room = batch['decoder_input_tokens'].shape[1] + max_tokens
  logits, cache = decode.prefill(model, batch, room)
  rows, vocab = logits.shape
  # Of each beam at most so many candidates are ends: among this many, enough go on.
  candidates = (1 + max(1, len(ends))) * beams

  def of_parents(x, parent):
    """Arrays [rows * beams, ...], each beam with what its parent had."""
    first, *rest = axes_of(x)
    apart = x.reshape(rows, beams, *x.shape[1:], out_sharding=jax.P(first, None, *rest))
    return pick(apart, parent).reshape(x.shape, out_sharding=jax.P(first, *rest))

  def select(number, logits, search):
    """The search after one more token, and the parents and the tokens of the beams that go on."""
    texts, score, finished, final, is_open = search
    logits = logits.reshape(rows, beams, vocab, out_sharding=spec('batch', None, None))
    total = score[:, :, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
    best, index = jax.lax.top_k(total.reshape(rows, beams * vocab), candidates)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    texts = jax.lax.dynamic_update_index_in_dim(pick(texts, parent), token, number, 2)
    # Comparisons stay on the devices of the tokens; a look-up in a constant table has no mesh.
    is_end = (token == end for end in ends)
    ends_now = functools.reduce(jnp.logical_or, is_end, number + 1 == max_tokens)
    score, on = jax.lax.top_k(jnp.where(ends_now, NEVER, best), beams)
    # Only an end among the best `beams` candidates finishes; a worse one would have been left behind.
    counts = ends_now & (jnp.arange(candidates) < beams) & is_open[:, None]
    new = jnp.where(counts, best / penalty(number + 1.0), NEVER)
    final, kept = jax.lax.top_k(jnp.concatenate([final, new], axis=1), beams)
    finished = pick(jnp.concatenate([finished, texts], axis=1), kept)
    bound = score[:, 0] / penalty(float(max_tokens) if patient else number + 1.0)
    is_open = is_open & (bound > final[:, -1])
    return (pick(texts, on), score, finished, final, is_open), pick(parent, on), pick(token, on)

  def one(loop):
    number, search, parent, token, cache = loop
    cache = jax.tree.map(lambda x: of_parents(x, parent), cache)
    token = token.reshape(rows * beams, 1, out_sharding=spec('batch', None))
    logits, cache = decode.step(model, token, cache)
    return number + 1, *select(number, logits, search), cache

  where = spec('batch', None, None)
  none = jnp.zeros((rows, beams, max_tokens), jnp.int32, out_sharding=where)
  final = jnp.full((rows, beams), NEVER, out_sharding=jax.P(*where[:2]))
  score = jnp.where(jnp.arange(beams) > 0, final, 0.0)  # all beams are one at first
  search = none, score, none, final, final[:, 0] < 0
  first = select(0, jnp.repeat(logits, beams, 0, out_sharding=spec_of(logits)), search)

  def going(loop):
    return (loop[0] < max_tokens) & jnp.any(loop[1][4])

  start = 1, *first, decode.repeat(cache, beams)
  _, (_, _, finished, final, _), *_ = jax.lax.while_loop(going, one, start)
  return finished, final


@functools.partial(
  jax.jit, static_argnames=('graphdef', 'max_tokens', 'beams', 'ends', 'penalty', 'patient')
)
def search(graphdef: nnx.GraphDef, params: dict, batch: Mapping, max_tokens: int, **settings):
  """`beam_search`, compiled, of a model's graph and parameters; `ends` is a tuple."""
  return beam_search(nnx.merge(graphdef, params), batch, max_tokens, **settings)
