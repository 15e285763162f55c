"""Requests as rows of tokens: what a model reads, which of its predictions count, and what was cut off.

A row is made of its request alone, never of its neighbours, so an answer does not depend on the order or the
company of the requests.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from research.core.errors import Invalid
from research.data.encoding import Encoding
from research.evaluation.requests import (
  Embed,
  Failed,
  GenerateUntil,
  LogLikelihood,
  Request,
  RollingLogLikelihood,
  TokensLogLikelihood,
)

ARCHITECTURES = ('decoder', 'prefix', 'encoder_decoder')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How requests become rows; part of every result, because numbers change with it.

  Attributes:
    length: the most tokens of a row; of an encoder-decoder, of each side.
    architecture: 'decoder', 'prefix' (a decoder whose context sees itself both ways), 'encoder_decoder'.
    begin: the id in front of every row; None for none (models that were trained without).
    start: where `begin` is None, the id in front of a text without any context; None is the end-of-text token.
    template: the chat template, a file for `data.conversations.template`, for tasks that are conversations.
    too_long: 'refuse' fails a request that does not fit; 'cut' leaves out the left of its context.
    stride: how many new tokens each window of a rolling log-likelihood scores; None is `length`, so that the
      windows touch. A smaller stride gives each token a longer context and costs more.
  """

  length: int
  architecture: str = 'decoder'
  begin: int | None = 0
  start: int | None = None
  template: str | None = None
  too_long: str = 'refuse'
  stride: int | None = None

  def __post_init__(self):
    if self.length < 2:
      raise Invalid(Settings, 'length', f'{self.length!r} must be 2 or more.')
    if self.architecture not in ARCHITECTURES:
      why = f'{self.architecture!r} is not one of {", ".join(ARCHITECTURES)}.'
      raise Invalid(Settings, 'architecture', why)
    if self.too_long not in ('refuse', 'cut'):
      raise Invalid(Settings, 'too_long', f"{self.too_long!r} is not 'refuse' or 'cut'.")
    if self.stride is not None and not 1 <= self.stride <= self.length:
      why = f'{self.stride!r} must be from 1 to the length {self.length}.'
      raise Invalid(Settings, 'stride', why)


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a model's batch.

  Attributes:
    request: the number of its request; several rows may answer one.
    inputs, targets: [tokens] what the decoder reads and what it should predict; targets are empty where it
      generates.
    scored: how many of the last targets count.
    prefix: how many of the inputs see each other both ways.
    encoder: what the encoder reads; empty without one.
    cut: tokens left out on the left.
  """

  request: int
  inputs: tuple[int, ...]
  targets: tuple[int, ...] = ()
  scored: int = 0
  prefix: int = 0
  encoder: tuple[int, ...] = ()
  cut: int = 0


def rows_of(
  number: int, request: Request, encoding: Encoding, settings: Settings
) -> list[Row] | Failed:
  """The rows that answer a request, or why it cannot be answered."""
  match request:
    case LogLikelihood():
      return _likelihood(number, request, encoding, settings)
    case TokensLogLikelihood():
      return _tokens_likelihood(number, request, encoding, settings)
    case RollingLogLikelihood():
      return _rolling(number, request, encoding, settings)
    case GenerateUntil():
      return _generate(number, request, encoding, settings)
    case Embed():
      return _embed(number, request, encoding, settings)


def split_tokens(context: str, continuation: str, encoding: Encoding) -> tuple[list, list]:
  """The tokens of a context and of what follows it, as lm-eval splits them.

  Spaces at the end of the context belong to the continuation, because most tokenizers join a space with the
  word after it. The two are encoded together and split where the context's own tokens end.
  """
  stripped = context.rstrip()
  context, continuation = stripped, context[len(stripped) :] + continuation
  whole = encoding.encode(context + continuation)
  first = len(encoding.encode(context))
  return whole[:first], whole[first:]


def _likelihood(number, request, encoding, settings) -> list[Row] | Failed:
  if settings.architecture == 'encoder_decoder':
    source, target = encoding.encode(request.context), encoding.encode(request.continuation)
    return _two_sided(number, source, target, len(target), encoding, settings)
  context, continuation = split_tokens(request.context, request.continuation, encoding)
  context = _begun(context, settings) or [_start(encoding, settings)]
  return _one_sided(number, context, continuation, settings)


def _tokens_likelihood(number, request, encoding, settings) -> list[Row] | Failed:
  context, continuation = list(request.context), list(request.continuation)
  if settings.architecture == 'encoder_decoder':
    # `_two_sided` ends what the encoder reads; lm-eval may have ended it already.
    source = context[:-1] if context[-1:] == [encoding.end] else context
    return _two_sided(number, source, continuation, len(continuation), encoding, settings)
  if not context:
    return Failed('the context has no tokens.')
  return _one_sided(number, context, continuation, settings)


def _begun(tokens: list[int], settings: Settings) -> list[int]:
  """Tokens after the id that begins a row; a text may already spell it (a chat template often does)."""
  if settings.begin is None or tokens[:1] == [settings.begin]:
    return tokens
  return [settings.begin, *tokens]


def _start(encoding: Encoding, settings: Settings) -> int:
  """The id in front of a text that has nothing in front of it, as in lm-eval."""
  ids = settings.begin, settings.start, encoding.end
  return next(i for i in ids if i is not None)


def _one_sided(number, context: list, continuation: list, settings) -> list[Row] | Failed:
  """The row of a decoder. `context` has what begins it."""
  if not continuation:
    return Failed('the continuation has no tokens.')
  sequence = context + continuation
  # The last token is predicted and never read.
  over = len(sequence) - 1 - settings.length
  if over > 0:
    if settings.too_long == 'refuse' or len(continuation) > settings.length:
      return _too_long(len(sequence) - 1, settings)
    sequence = sequence[over:]
  prefix = len(sequence) - len(continuation) if settings.architecture == 'prefix' else 0
  inputs, targets = sequence[:-1], sequence[1:]
  return [Row(number, tuple(inputs), tuple(targets), len(continuation), prefix, cut=max(over, 0))]


def _rolling(number, request, encoding, settings) -> list[Row] | Failed:
  tokens = encoding.encode(request.text)
  begin = _start(encoding, settings)
  if not tokens:
    return Failed('the text has no tokens.')
  if settings.architecture == 'encoder_decoder':
    # Nothing is given: the encoder reads an end-of-text token alone.
    windows = _windows(len(tokens), settings.length, settings.stride or settings.length)
    return [
      Row(
        number,
        tuple([begin, *tokens][first:last]),
        tuple(tokens[first:last]),
        last - scored_from,
        encoder=(encoding.end,),
      )
      for first, scored_from, last in windows
    ]
  windows = _windows(len(tokens), settings.length, settings.stride or settings.length)
  sequence = [begin, *tokens]
  return [
    Row(number, tuple(sequence[first:last]), tuple(tokens[first:last]), last - scored_from)
    for first, scored_from, last in windows
  ]


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
  """(first target, first scored target, end) of windows that score each of `count` targets exactly once."""
  end = min(length, count)
  yield 0, 0, end
  while end < count:
    scored_from, end = end, min(end + stride, count)
    yield max(0, end - length), scored_from, end


def _generate(number, request, encoding, settings) -> list[Row] | Failed:
  if request.max_tokens >= settings.length:
    return Failed(
      f'max_tokens of {request.max_tokens} leave no room for a context in {settings.length}.'
    )
  context = encoding.encode(request.context)
  if settings.architecture == 'encoder_decoder':
    return _two_sided(number, context, [], 0, encoding, settings)
  sequence = _begun(context, settings)
  if not sequence:
    return Failed('the context has no tokens, and Settings.begin is None: nothing to start from.')
  over = len(sequence) + request.max_tokens - settings.length
  if over > 0 and settings.too_long == 'refuse':
    return _too_long(len(sequence) + request.max_tokens, settings)
  sequence = sequence[max(over, 0) :]
  prefix = len(sequence) if settings.architecture == 'prefix' else 0
  return [Row(number, tuple(sequence), prefix=prefix, cut=max(over, 0))]


def _embed(number, request, encoding, settings) -> list[Row] | Failed:
  if request.pooling not in ('mean', 'last'):
    return Failed(f"pooling {request.pooling!r} is not 'mean' or 'last'.")
  if settings.architecture == 'encoder_decoder':
    return Failed('an encoder-decoder has two sides: it embeds no single text.')
  tokens = encoding.encode(request.text)
  sequence = _begun(tokens, settings)
  if not tokens:
    return Failed('the text has no tokens.')
  over = len(sequence) - settings.length
  if over > 0 and settings.too_long == 'refuse':
    return _too_long(len(sequence), settings)
  sequence = sequence[max(over, 0) :]
  prefix = len(sequence) if settings.architecture == 'prefix' else 0
  return [Row(number, tuple(sequence), prefix=prefix, cut=max(over, 0))]


def _two_sided(number, source, target, scored, encoding, settings) -> list[Row] | Failed:
  """A row of an encoder-decoder: the encoder reads the context and an end-of-text token, as in training."""
  encoder = [*source, encoding.end]
  over = len(encoder) - settings.length
  if (over > 0 and settings.too_long == 'refuse') or len(target) > settings.length:
    return _too_long(max(len(encoder), len(target)), settings)
  encoder = encoder[max(over, 0) :]
  begin = 0 if settings.begin is None else settings.begin
  inputs = [begin, *target[:-1]] if target else [begin]
  return [
    Row(number, tuple(inputs), tuple(target), scored, encoder=tuple(encoder), cut=max(over, 0))
  ]


def _too_long(tokens: int, settings: Settings) -> Failed:
  return Failed(
    f"{tokens} tokens do not fit the length {settings.length}; too_long='cut' would leave out the left "
    'of the context.'
  )


def bucket(tokens: int, length: int, shortest: int = 16) -> int:
  """A padded length: the next power of two from `shortest` on, at most `length`. So few are compiled."""
  return min(max(shortest, 1 << (tokens - 1).bit_length()), length)


def batch_of(
  rows: list[Row], length: int, encoder_length: int = 0, prefix: bool = False, marked: bool = False
) -> dict:
  """Rows as arrays [batch, length] int32, padded on the right with zeros.

  Args:
    marked: whether the batch tells which tokens are padding, as a prompt that is read for decoding must.
  """
  batch = {
    'decoder_input_tokens': _padded([row.inputs for row in rows], length),
    'decoder_target_tokens': _padded([row.targets for row in rows], length),
  }
  if prefix:
    batch['decoder_causal_attention'] = _padded([(1,) * row.prefix for row in rows], length)
  if encoder_length:
    batch['encoder_input_tokens'] = _padded([row.encoder for row in rows], encoder_length)
    filled = [(1,) * len(row.encoder) for row in rows]
    batch['encoder_segment_ids'] = _padded(filled, encoder_length)
    # The decoder's own segment is 1 throughout, so that all of it sees the encoder's tokens.
    batch['decoder_segment_ids'] = np.ones((len(rows), length), np.int32)
  if marked:
    batch['decoder_segment_ids'] = _padded([(1,) * len(row.inputs) for row in rows], length)
  return batch


def _padded(rows: list[tuple[int, ...]], length: int) -> np.ndarray:
  padded = np.zeros((len(rows), length), np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded
