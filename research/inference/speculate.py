"""Speculative decoding: a cheap draft guesses several tokens, and the model checks them all in one step.

The answer has exactly the distribution of decoding without guesses (Leviathan et al. 2023, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318). A guess x from the draft's distribution q is accepted with probability
min(1, p(x) / q(x)), where p is the model's distribution. The first guess that is rejected is drawn again from
max(0, p - q), normalised. Greedy decoding is the limit in which p and q have all their mass on one token.

Rejected guesses are removed from the cache by a smaller length of the row: attention does not see their
entries, and the next tokens overwrite them. A recurrence cannot go back, so models with one are refused.
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
from research.inference.ngrams import Ngram
from research.inference.sampling import Sampling
from research.inference.state import pick

NOT_A_TOKEN = -1  # in place of a token whose logits were not numbers


class Continuations(NamedTuple):
  """The result of speculative decoding.

  Attributes:
    tokens: [batch, max_tokens]; `NOT_A_TOKEN` where the model's logits were not numbers.
    length: [batch], how many of the tokens belong to the text: those up to the first end, which belongs to it.
    steps: how often the model was called after it had read the prompts.
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
    model: as for `decode.prefill`.
    draft: a smaller model of the same vocabulary, or `Ngram`.
    batch: as for `decode.prefill`.
    max_tokens: the most tokens of a continuation.
    settings: how tokens are chosen.
    guesses: how many tokens are guessed per step of the model.
    ends: ids that end a text.
    seeds: [batch] uint32, the seed of every row; by default they count up from the seed of `settings`.

  Raises:
    UserError: a model has a recurrence, the vocabularies differ, or the settings have a penalty or a bias.
  """
  _check(model, draft, settings, guesses)
  prompts = batch['decoder_input_tokens']
  # A step writes `guesses` + 1 entries, also when a row lacks only its last token.
  room = prompts.shape[1] + max_tokens + guesses + 1
  logits, cache = _prefill(model, batch, room, guesses)
  draft_cache = None
  if isinstance(draft, nnx.Module):
    _, draft_cache = _prefill(draft, batch, room, guesses)
  if seeds is None:
    seeds = jnp.arange(len(prompts), dtype=jnp.uint32) + settings.seed
  speculation = _Speculation(model, draft, max_tokens, settings, guesses, seeds)
  first = cache.length  # the position of each row's first new token
  token = _draw(speculation.keys(first, 0), speculation.probabilities(logits[:, None])[:, 0])
  text = _write(_left_aligned(batch, room), first, token[:, None])

  def unfinished(loop):
    """Whether any row has neither an end nor all its tokens."""
    _, count, text, *_ = loop
    return jnp.any(count < _length(text, first, max_tokens, count, ends))

  loop = jnp.zeros((), jnp.int32), jnp.ones_like(first), text, cache, draft_cache
  steps, count, text, *_ = jax.lax.while_loop(unfinished, speculation.step, loop)
  tokens = _read(text, first, max_tokens)
  return Continuations(tokens, _length(text, first, max_tokens, count, ends), steps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Speculation:
  """The step of speculative decoding; the fields are the arguments of `speculate`."""

  model: nnx.Module
  draft: nnx.Module | Ngram
  max_tokens: int
  settings: Sampling
  guesses: int
  seeds: jax.Array

  def keys(self, position, purpose: int):
    """Returns a random key per row, for the token after its position and for one purpose."""

    def key(seed, position):
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(key)(self.seeds, position)

  def probabilities(self, logits: jax.Array) -> jax.Array:
    return _probabilities(self.settings, logits)

  def step(self, loop: tuple) -> tuple:
    """Guesses tokens, checks them, and appends the accepted ones and one more."""
    steps, count, text, cache, draft_cache = loop
    start = cache.length  # the position of the newest token, which neither model has read
    token = jnp.take_along_axis(text, start[:, None], axis=1)
    if isinstance(self.draft, nnx.Module):
      guessed, q, draft_cache = self.guess(token, draft_cache)
    else:
      guessed = self.draft.guess(text, start, self.guesses)
      q = jax.nn.one_hot(guessed, self.model.vocab)
    logits, cache = decode.step(self.model, jnp.concatenate([token, guessed], axis=1), cache)
    accept_keys, last_keys = self.keys(start, 1), self.keys(start, 2)
    accepted, last = _accept(accept_keys, last_keys, guessed, self.probabilities(logits), q)
    places = jnp.arange(self.guesses + 1)
    new = jnp.where(places < accepted[:, None], jnp.pad(guessed, ((0, 0), (0, 1))), last[:, None])
    text = _write(text, start + 1, new)
    # A row that has all its tokens stays at its position, or it would pass the end of its room.
    more = jnp.minimum(accepted + 1, self.max_tokens - count)
    cache = dataclasses.replace(cache, length=start + more)
    if draft_cache is not None:
      draft_cache = dataclasses.replace(draft_cache, length=start + more)
    return steps + 1, count + more, text, cache, draft_cache

  def guess(
    self, token: jax.Array, cache: decode.Cache
  ) -> tuple[jax.Array, jax.Array, decode.Cache]:
    """Draws guesses from the draft model.

    Args:
      token: [rows, 1], the newest tokens.
      cache: the draft's.

    Returns:
      Guesses [rows, guesses], the distributions that they are drawn from, and the draft's cache after them all.
    """

    def one_token(loop, _):
      token, cache = loop
      position = cache.length
      logits, cache = decode.step(self.draft, token, cache)
      q = self.probabilities(logits)[:, 0]
      token = _draw(self.keys(position, 3), q)[:, None]
      return (token, cache), (token[:, 0], q)

    # One step more than there are guesses, so that the draft has read the last guess too.
    steps = self.guesses + 1
    (_, cache), (guessed, q) = jax.lax.scan(one_token, (token, cache), length=steps)
    return guessed.T[:, : self.guesses], jnp.swapaxes(q, 0, 1)[:, : self.guesses], cache


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
  """`speculate`, compiled. It takes the graphs and the parameters of the model and of its draft."""
  draft_model = draft if isinstance(draft, Ngram) else nnx.merge(draft, draft_params)
  model = nnx.merge(graphdef, params)
  return speculate(model, draft_model, batch, max_tokens, seeds=seeds, **knobs)


def check_settings(settings: Sampling, guesses: int) -> None:
  """Raises UserError if the settings do not work with a draft, or there is nothing to guess."""
  if settings.penalises or settings.logit_bias:
    raise UserError('a draft works with no penalty and no logit_bias: generate without a draft.')
  if guesses < 1:
    raise UserError(f'{guesses} guesses: choose 1 or more.')


def _check(model, draft, settings: Sampling, guesses: int) -> None:
  check_settings(settings, guesses)
  if isinstance(draft, nnx.Module) and draft.vocab != model.vocab:
    raise UserError(
      f'the draft has {draft.vocab} logits and the model {model.vocab}: both need the same vocabulary.'
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
  """Returns the distributions that the settings draw from, [rows, length, vocab]; NaN for logits that
  are not numbers.
  """
  flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
  knobs = {k: jnp.full(flat.shape[0], x[0]) for k, x in sampling.as_rows([settings]).items()}
  p = jax.nn.softmax(sampling.distribution(flat, knobs, settings.filters))
  # A greedy row has one token of probability 1, whatever its logits are.
  numbers = jnp.isfinite(jnp.max(flat, axis=-1, keepdims=True))
  return jnp.where(numbers, p, jnp.nan).reshape(logits.shape)


def _draw(keys: jax.Array, p: jax.Array) -> jax.Array:
  """Draws a token for each row from probabilities p [rows, vocab]; `NOT_A_TOKEN` if they are NaN."""
  tokens = jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)
  return jnp.where(jnp.isnan(p[:, 0]), NOT_A_TOKEN, tokens)


def _accept(keys, last_keys, guessed, p, q) -> tuple[jax.Array, jax.Array]:
  """Returns how many guesses of each row are accepted, and the token after them (Leviathan et al., algorithm
  1).

  Args:
    keys: [rows], for the acceptance.
    last_keys: [rows], for the token after the accepted ones.
    guessed: [rows, guesses].
    p: [rows, guesses + 1, vocab], the model's distributions.
    q: [rows, guesses, vocab], the draft's.
  """
  guesses = guessed.shape[1]

  def of_guess(x):
    return jnp.take_along_axis(x, guessed[..., None], axis=2)[..., 0]

  u = jax.vmap(lambda key: jax.random.uniform(key, (guesses,)))(keys)
  agrees = u * of_guess(q) < of_guess(p[:, :-1])
  accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)
  # After the last guess there is no q to subtract.
  rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
  rest = jnp.take_along_axis(rest, accepted[:, None, None], axis=1)[:, 0]
  # If p and q are equal up to rounding, nothing remains after the subtraction. Then p itself is right.
  plain = jnp.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
  rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, plain)
  return accepted, _draw(last_keys, rest)


def _left_aligned(batch, room: int) -> jax.Array:
  """Returns the prompts from position 0 on, [rows, room], padded with 0."""
  tokens = batch['decoder_input_tokens']
  real = batch.get('decoder_segment_ids', jnp.ones_like(tokens)) > 0
  tokens = pick(tokens, jnp.argsort(~real, axis=1, stable=True))
  return jnp.pad(tokens, ((0, 0), (0, room - tokens.shape[1])))


def _write(text: jax.Array, start: jax.Array, tokens: jax.Array) -> jax.Array:
  """Writes tokens [rows, n] into text [rows, room], at each row's start [rows]."""
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  return jax.vmap(put)(text, tokens, start)


def _read(text: jax.Array, start: jax.Array, length: int) -> jax.Array:
  return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, length))(text, start)


def _length(text, first, max_tokens: int, count, ends) -> jax.Array:
  """Returns each continuation's length [rows]: up to the first end in its `count` tokens, or `max_tokens`."""
  tokens = _read(text, first, max_tokens)
  places = jnp.arange(max_tokens)
  is_end = jnp.isin(tokens, jnp.array(ends, jnp.int32)) & (places < count[:, None])
  return jnp.min(jnp.where(is_end, places + 1, max_tokens), axis=1)
