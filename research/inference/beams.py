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

NEVER = -1e9  # the score of a beam that does not exist

# Maps the number of tokens of a text to the divisor of its log-likelihood.
Penalty = Callable[[float], float]


def by_length(length, *, power: float = 1.0):
  """length^power, the convention of transformers. The stop token counts."""
  return length**power


def wu(length, *, power: float = 0.6):
  """((5 + length) / 6)^power (Wu et al. 2016, arXiv:1609.08144, equation 14), the convention of T5X."""
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
  """Returns the best continuations of every prompt by log-likelihood / penalty(length).

  The search of a prompt ends once its best open beam would not be among the finished ones, if it ended now (the
  default of transformers). If `patient`, it ends once that beam would not be among them at the greatest length
  (T5X, and 'never' of transformers).

  Args:
    model: as for `decode.prefill`.
    batch: as for `decode.prefill`.
    max_tokens: the most tokens of a continuation.
    beams: how many continuations are followed, and returned.
    ends: ids that end a text.
    penalty: see above.
    patient: see above.

  Returns:
    Tokens [batch, beams, max_tokens] with zeros after the end, and scores [batch, beams], the best first.

  Raises:
    UserError: there are more beams than tokens in the vocabulary.
  """
  if not 1 <= beams <= model.vocab // 2:
    raise UserError(f'{beams} beams: choose from 1 to {model.vocab // 2}, half of the vocabulary.')
  room = batch['decoder_input_tokens'].shape[1] + max_tokens
  logits, cache = decode.prefill(model, batch, room)
  rows, vocab = logits.shape
  # At most len(ends) candidates of each beam are ends, so among so many candidates at least `beams` continue.
  candidates = (1 + max(1, len(ends))) * beams

  def of_parents(x, parent):
    """Returns x [rows * beams, ...] with every beam's entry replaced by that of its parent."""
    first, *rest = axes_of(x)
    apart = x.reshape(rows, beams, *x.shape[1:], out_sharding=jax.P(first, None, *rest))
    return pick(apart, parent).reshape(x.shape, out_sharding=jax.P(first, *rest))

  def select(number, logits, search):
    """Returns the search after one more token, and the parents and the tokens of the beams that continue."""
    texts, score, finished, final, is_open = search
    logits = logits.reshape(rows, beams, vocab, out_sharding=spec('batch', None, None))
    total = score[:, :, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
    best, index = jax.lax.top_k(total.reshape(rows, beams * vocab), candidates)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    texts = jax.lax.dynamic_update_index_in_dim(pick(texts, parent), token, number, 2)
    # Comparisons stay on the devices of the tokens. A look-up in a constant table would have no mesh.
    is_end = (token == end for end in ends)
    ends_now = functools.reduce(jnp.logical_or, is_end, number + 1 == max_tokens)
    score, continued = jax.lax.top_k(jnp.where(ends_now, NEVER, best), beams)
    # Only an end among the best `beams` candidates finishes: without ends, a worse candidate is dropped.
    counts = ends_now & (jnp.arange(candidates) < beams) & is_open[:, None]
    new = jnp.where(counts, best / penalty(number + 1.0), NEVER)
    final, chosen = jax.lax.top_k(jnp.concatenate([final, new], axis=1), beams)
    finished = pick(jnp.concatenate([finished, texts], axis=1), chosen)
    bound = score[:, 0] / penalty(float(max_tokens) if patient else number + 1.0)
    is_open = is_open & (bound > final[:, -1])
    search = pick(texts, continued), score, finished, final, is_open
    return search, pick(parent, continued), pick(token, continued)

  def one_token(loop):
    number, search, parent, token, cache = loop
    cache = jax.tree.map(lambda x: of_parents(x, parent), cache)
    token = token.reshape(rows * beams, 1, out_sharding=spec('batch', None))
    logits, cache = decode.step(model, token, cache)
    return number + 1, *select(number, logits, search), cache

  sharding = spec('batch', None, None)
  no_text = jnp.zeros((rows, beams, max_tokens), jnp.int32, out_sharding=sharding)
  final = jnp.full((rows, beams), NEVER, out_sharding=jax.P(*sharding[:2]))
  # All beams are equal at first. Only the first one counts, or each would continue with the same tokens.
  score = jnp.where(jnp.arange(beams) > 0, final, 0.0)
  search = no_text, score, no_text, final, final[:, 0] < 0
  first = select(0, jnp.repeat(logits, beams, 0, out_sharding=spec_of(logits)), search)

  def unfinished(loop):
    return (loop[0] < max_tokens) & jnp.any(loop[1][4])

  start = 1, *first, decode.repeat(cache, beams)
  _, (_, _, finished, final, _), *_ = jax.lax.while_loop(unfinished, one_token, start)
  return finished, final


@functools.partial(
  jax.jit, static_argnames=('graphdef', 'max_tokens', 'beams', 'ends', 'penalty', 'patient')
)
def search(graphdef: nnx.GraphDef, params: dict, batch: Mapping, max_tokens: int, **settings):
  """`beam_search`, compiled. It takes a model's graph and parameters, and `ends` as a tuple."""
  return beam_search(nnx.merge(graphdef, params), batch, max_tokens, **settings)
