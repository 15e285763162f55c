"""Speculative decoding: several tokens are guessed cheaply, and the model checks them all in one step.

The answer has exactly the distribution of decoding without guesses (Leviathan et al. 2023, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318): a guess x of the draft's distribution q is kept with probability
min(1, p(x) / q(x)) for the model's p, and the first that is refused is drawn again from max(0, p - q). Greedy
is the limit in which p and q are all on one token.

Guesses that were refused are forgotten by setting a row's length back: nobody sees their entries, and the next
tokens take their slots. A recurrence cannot forget, so models with one are refused.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import UserError
from research.inference import decode, sampling
from research.inference.sampling import Sampling
from research.inference.state import pick


@dataclasses.dataclass(frozen=True)
class Ngram:
  """Guesses without a model: what followed the last time that the row's last `n` tokens occurred.

  (Prompt look-up, Saxena 2023; it helps where an answer repeats its prompt, as in editing and summaries.)
  """

  n: int = 2


class Continuations(NamedTuple):
  """What speculative decoding gives.

  tokens: [batch, max_tokens]; length: [batch], how many of them count (up to the first end, which is one of
  them); steps: how often the model was called after it read the prompts.
  """

  tokens: jax.Array
  length: jax.Array
  steps: jax.Array


def speculate(
  model: nnx.Module,
  draft: nnx.Module | Ngram,
  batch: Mapping[str, jax.Array],
  max_tokens: int,
  *,
  settings: Sampling,
  guesses: int = 4,
  ends: tuple[int, ...] = (),
  seeds: jax.Array | None = None,
) -> Continuations:
  """Continues every prompt.

  Args:
    model, batch: as of `decode.prefill`.
    draft: a smaller model of the same vocabulary, or `Ngram`.
    max_tokens: the most tokens of a continuation.
    settings: how tokens are chosen.
    guesses: how many tokens are guessed for each step of the model.
    ends: ids that end a text.
    seeds: [batch] uint32, of each row; by default they count up from the seed of `settings`.

  Raises:
    UserError: a model cannot forget tokens, the vocabularies differ, or the settings have a penalty or a bias.
  """
  _check(model, draft, settings, guesses)
  prompts = batch['decoder_input_tokens']
  rows, room = prompts.shape[0], prompts.shape[1] + max_tokens + guesses + 1
  logits, cache = _prefill(model, batch, room, guesses)
  own = _prefill(draft, batch, room, guesses)[1] if isinstance(draft, nnx.Module) else None
  if seeds is None:
    seeds = jnp.arange(rows, dtype=jnp.uint32) + settings.seed
  probabilities = functools.partial(_probabilities, settings)

  def keys(position, purpose: int):
    """A key for each row, its position and what it is for."""

    def key(seed, position):
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(key)(seeds, position)

  first = cache.length  # the position of each row's first new token
  token = _draw(keys(first, 0), probabilities(logits[:, None])[:, 0])
  text = _write(_left_aligned(batch, room), first, token[:, None])

  def lacks(text, count):
    """[rows], whether a row has neither an end nor all its tokens."""
    return count < _length(text, first, max_tokens, count, ends)

  def one(loop):
    steps, count, text, cache, own = loop
    start = cache.length  # the position of the newest token, which no model has read
    token = jnp.take_along_axis(text, start[:, None], axis=1)
    if isinstance(draft, nnx.Module):
      guessed, q, own = _from_model(draft, token, own, guesses, probabilities, keys)
    else:
      guessed = _from_ngrams(text, start, draft.n, guesses)
      q = jax.nn.one_hot(guessed, model.vocab)
    logits, cache = decode.step(model, jnp.concatenate([token, guessed], axis=1), cache)
    kept, last = _accept(keys(start, 1), keys(start, 2), guessed, probabilities(logits), q)
    places = jnp.arange(guesses + 1)
    new = jnp.where(places < kept[:, None], jnp.pad(guessed, ((0, 0), (0, 1))), last[:, None])
    text = _write(text, start + 1, new)
    # A row that has all its tokens stays where it is, or it would walk past its room.
    more = jnp.minimum(kept + 1, max_tokens - count)
    cache = dataclasses.replace(cache, length=start + more)
    own = own and dataclasses.replace(own, length=start + more)
    return steps + 1, count + more, text, cache, own

  loop = jnp.zeros((), jnp.int32), jnp.ones_like(first), text, cache, own
  steps, count, text, *_ = jax.lax.while_loop(lambda x: jnp.any(lacks(x[2], x[1])), one, loop)
  tokens = _read(text, first, max_tokens)
  return Continuations(tokens, _length(text, first, max_tokens, count, ends), steps)


@functools.partial(
  jax.jit,
  static_argnames=('graphdef', 'draft', 'max_tokens', 'settings', 'guesses', 'ends'),
)
def compiled(
  graphdef: nnx.GraphDef,
  params: dict,
  draft: nnx.GraphDef | Ngram,
  draft_params: dict | None,
  batch: Mapping[str, jax.Array],
  max_tokens: int,
  seeds: jax.Array,
  **knobs,
) -> Continuations:
  """`speculate`, compiled, of a model's graph and parameters and those of its draft."""
  guesser = draft if isinstance(draft, Ngram) else nnx.merge(draft, draft_params)
  model = nnx.merge(graphdef, params)
  return speculate(model, guesser, batch, max_tokens, seeds=seeds, **knobs)


def check_settings(settings: Sampling, guesses: int) -> None:
  """Raises where the settings go with no draft, or there is nothing to guess."""
  if settings.penalises or settings.logit_bias:
    raise UserError('a draft goes with no penalty and no logit_bias: generate without one.')
  if guesses < 1:
    raise UserError(f'{guesses} guesses: choose 1 or more.')


def _check(model, draft, settings: Sampling, guesses: int) -> None:
  check_settings(settings, guesses)
  if isinstance(draft, nnx.Module) and draft.vocab != model.vocab:
    raise UserError(
      f'the draft has {draft.vocab} logits and the model {model.vocab}: they need one vocabulary.'
    )
  if isinstance(draft, Ngram) and draft.n < 1:
    raise UserError(f'n-grams of {draft.n} tokens: choose 1 or more.')


def _prefill(model, batch, room: int, guesses: int):
  logits, cache = decode.prefill(model, batch, room, ahead=guesses + 1)
  if not cache.forgets:
    raise UserError(
      'the model has a recurrence, which cannot forget a guess that was refused: generate without a draft.'
    )
  return logits, cache


def _probabilities(settings: Sampling, logits: jax.Array) -> jax.Array:
  """[rows, length, vocab], what the settings draw from; greedy, all of it is on one token."""
  flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
  knobs = {k: jnp.full(flat.shape[0], x[0]) for k, x in sampling.as_rows([settings]).items()}
  return jax.nn.softmax(sampling.distribution(flat, knobs, settings.filters)).reshape(logits.shape)


def _draw(keys: jax.Array, p: jax.Array) -> jax.Array:
  """A token of each row, from p [rows, vocab]."""
  return jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)


def _from_model(draft, token, cache, guesses: int, probabilities, keys):
  """Guesses [rows, guesses], the distributions that they are from, and the draft's cache after them all."""

  def one(loop, _):
    token, cache = loop
    position = cache.length
    logits, cache = decode.step(draft, token, cache)
    q = probabilities(logits)[:, 0]
    token = _draw(keys(position, 3), q)[:, None]
    return (token, cache), (token[:, 0], q)

  # Once more than there are guesses, so that the draft has read the last of them too.
  (_, cache), (guessed, q) = jax.lax.scan(one, (token, cache), length=guesses + 1)
  return guessed.T[:, :guesses], jnp.swapaxes(q, 0, 1)[:, :guesses], cache


def _from_ngrams(text: jax.Array, start: jax.Array, n: int, guesses: int) -> jax.Array:
  """[rows, guesses]: what followed the last place where the newest n tokens of a row stood before."""
  places = jnp.arange(text.shape[1])

  def one(text, start):
    same = (places >= n - 1) & (places < start)
    for back in range(n):
      same &= jnp.roll(text, back) == text[start - back]
    place = jnp.max(jnp.where(same, places, 0))
    return jax.lax.dynamic_slice_in_dim(text, place + 1, guesses)

  return jax.vmap(one)(text, start)


def _accept(keys, last_keys, guessed, p, q) -> tuple[jax.Array, jax.Array]:
  """How many guesses of each row are kept, and the token that comes after them.

  Args:
    guessed: [rows, guesses]; p: [rows, guesses + 1, vocab]; q: [rows, guesses, vocab].
  """
  guesses = guessed.shape[1]

  def of_guess(x):
    return jnp.take_along_axis(x, guessed[..., None], axis=2)[..., 0]

  u = jax.vmap(lambda key: jax.random.uniform(key, (guesses,)))(keys)
  agrees = u * of_guess(q) < of_guess(p[:, :-1])
  kept = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)
  # Behind the last guess there is none to subtract.
  rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
  rest = jnp.take_along_axis(rest, kept[:, None, None], axis=1)[:, 0]
  # Where p and q are equal but for rounding nothing is left, and p is right.
  plain = jnp.take_along_axis(p, kept[:, None, None], axis=1)[:, 0]
  rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, plain)
  return kept, _draw(last_keys, rest)


def _left_aligned(batch, room: int) -> jax.Array:
  """[rows, room], the prompts from position 0 on."""
  tokens = batch['decoder_input_tokens']
  real = batch.get('decoder_segment_ids', jnp.ones_like(tokens)) > 0
  tokens = pick(tokens, jnp.argsort(~real, axis=1, stable=True))
  return jnp.pad(tokens, ((0, 0), (0, room - tokens.shape[1])))


def _write(text: jax.Array, start: jax.Array, tokens: jax.Array) -> jax.Array:
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  return jax.vmap(put)(text, tokens, start)


def _read(text: jax.Array, start: jax.Array, length: int) -> jax.Array:
  return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, length))(text, start)


def _length(text, first, max_tokens: int, count, ends) -> jax.Array:
  """[rows]: how long a continuation is, by the first end among its `count` tokens, or at most."""
  tokens = _read(text, first, max_tokens)
  places = jnp.arange(max_tokens)
  is_end = jnp.isin(tokens, jnp.array(ends, jnp.int32)) & (places < count[:, None])
  return jnp.min(jnp.where(is_end, places + 1, max_tokens), axis=1)
