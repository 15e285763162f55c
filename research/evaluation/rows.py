"""Requests as rows of tokens: what a model reads, which of its predictions count, and what was cut off.

A row is made of its request alone, never of its neighbours, so an answer does not depend on the order of the
requests or on what else is asked.
"""

import dataclasses
from collections.abc import Iterator

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
NO_CONTINUATION = 'the continuation has no tokens.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How requests become rows. The settings are part of every result, because numbers change with them.

  Attributes:
    length: the most tokens of a row; of an encoder-decoder, of each side.
    architecture: 'decoder', 'prefix' (a decoder whose context sees itself both ways), 'encoder_decoder'.
    begin: the id in front of every row; None for models that were trained without one.
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
    inputs: [tokens] what the decoder reads.
    targets: [tokens] what it should predict after each input; empty where it generates.
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

  @property
  def context(self) -> int:
    """How many of the inputs stand before the first scored target. The last of them predicts it."""
    return len(self.inputs) - self.scored + 1


def rows_of(
  number: int, request: Request, encoding: Encoding, settings: Settings
) -> list[Row] | Failed:
  """The rows that answer request `number`, or why it cannot be answered."""
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


def split_tokens(
  context: str, continuation: str, encoding: Encoding
) -> tuple[list[int], list[int]]:
  """The tokens of a context and of its continuation, as lm-eval splits them.

  Spaces at the end of the context belong to the continuation, because most tokenizers join a space with the
  word after it. The two are encoded together and split where the context's own tokens end.
  """
  stripped = context.rstrip()
  whole = encoding.encode(context + continuation)
  first = len(encoding.encode(stripped))
  return whole[:first], whole[first:]


def _likelihood(number, request, encoding, settings) -> list[Row] | Failed:
  if settings.architecture == 'encoder_decoder':
    source = encoding.encode(request.context)
    continuation = encoding.encode(request.continuation)
    return _encoder_decoder_row(number, source, continuation, encoding, settings)
  context, continuation = split_tokens(request.context, request.continuation, encoding)
  context = with_begin(context, settings) or [first_id(encoding, settings)]
  return _decoder_row(number, context, continuation, settings)


def _tokens_likelihood(number, request, encoding, settings) -> list[Row] | Failed:
  context = list(request.context)
  continuation = list(request.continuation)
  if settings.architecture == 'encoder_decoder':
    # `_encoder_decoder_row` puts end-of-text behind the source; lm-eval may have put it there already.
    source = context[:-1] if context[-1:] == [encoding.end] else context
    return _encoder_decoder_row(number, source, continuation, encoding, settings)
  if not context:
    return Failed('the context has no tokens.')
  return _decoder_row(number, context, continuation, settings)


def with_begin(tokens: list[int], settings: Settings) -> list[int]:
  """Tokens after the id that begins a row. A text may already spell it; a chat template often does."""
  if settings.begin is None or tokens[:1] == [settings.begin]:
    return tokens
  return [settings.begin, *tokens]


def first_id(encoding: Encoding, settings: Settings) -> int:
  """The id in front of a text without a context, chosen as lm-eval does."""
  if settings.begin is not None:
    return settings.begin
  return encoding.end if settings.start is None else settings.start


def _decoder_row(number, context: list, continuation: list, settings) -> list[Row] | Failed:
  """The row of a decoder. The context has its first id already."""
  if not continuation:
    return Failed(NO_CONTINUATION)
  sequence = context + continuation
  # The last token is predicted and never read.
  excess = len(sequence) - 1 - settings.length
  if excess > 0:
    if settings.too_long == 'refuse' or len(continuation) > settings.length:
      return _too_long(len(sequence) - 1, settings)
    sequence = sequence[excess:]
  prefix = len(sequence) - len(continuation) if settings.architecture == 'prefix' else 0
  return [
    Row(
      number,
      inputs=tuple(sequence[:-1]),
      targets=tuple(sequence[1:]),
      scored=len(continuation),
      prefix=prefix,
      cut=max(excess, 0),
    )
  ]


def _encoder_decoder_row(
  number, source, continuation, encoding, settings, generates=False
) -> list[Row] | Failed:
  """The row of an encoder-decoder: the encoder reads the context and an end-of-text token, as in training."""
  if not continuation and not generates:
    return Failed(NO_CONTINUATION)
  encoder = [*source, encoding.end]
  excess = len(encoder) - settings.length
  if (excess > 0 and settings.too_long == 'refuse') or len(continuation) > settings.length:
    return _too_long(max(len(encoder), len(continuation)), settings)
  begin = 0 if settings.begin is None else settings.begin
  return [
    Row(
      number,
      inputs=(begin, *continuation[:-1]),
      targets=tuple(continuation),
      scored=len(continuation),
      encoder=tuple(encoder[max(excess, 0) :]),
      cut=max(excess, 0),
    )
  ]


def _rolling(number, request, encoding, settings) -> list[Row] | Failed:
  tokens = encoding.encode(request.text)
  if not tokens:
    return Failed('the text has no tokens.')
  inputs = [first_id(encoding, settings), *tokens]
  # The text is the decoder's. An encoder has nothing to read but an end-of-text token.
  encoder = (encoding.end,) if settings.architecture == 'encoder_decoder' else ()
  windows = _windows(len(tokens), settings.length, settings.stride or settings.length)
  return [
    Row(
      number,
      inputs=tuple(inputs[first:end]),
      targets=tuple(tokens[first:end]),
      scored=end - scored_from,
      encoder=encoder,
    )
    for first, scored_from, end in windows
  ]


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
  """(first target, first scored target, end) of windows that score each of `count` targets exactly once."""
  end = min(length, count)
  yield 0, 0, end
  while end < count:
    scored_from = end
    end = min(end + stride, count)
    yield max(0, end - length), scored_from, end


def _generate(number, request, encoding, settings) -> list[Row] | Failed:
  if request.max_tokens >= settings.length:
    return Failed(
      f'max_tokens of {request.max_tokens} leave no room for a context in {settings.length}.'
    )
  context = encoding.encode(request.context)
  if settings.architecture == 'encoder_decoder':
    return _encoder_decoder_row(number, context, [], encoding, settings, generates=True)
  sequence = with_begin(context, settings)
  if not sequence:
    return Failed('the context has no tokens, and Settings.begin is None: nothing to start from.')
  return _read_only_row(number, sequence, request.max_tokens, settings)


def _embed(number, request, encoding, settings) -> list[Row] | Failed:
  if request.pooling not in ('mean', 'last'):
    return Failed(f"pooling {request.pooling!r} is not 'mean' or 'last'.")
  if settings.architecture == 'encoder_decoder':
    return Failed('an encoder-decoder has two sides: it embeds no single text.')
  tokens = encoding.encode(request.text)
  if not tokens:
    return Failed('the text has no tokens.')
  return _read_only_row(number, with_begin(tokens, settings), 0, settings)


def _read_only_row(number, sequence: list, room: int, settings) -> list[Row] | Failed:
  """The row of a decoder that predicts no given tokens; `room` tokens must fit behind it."""
  excess = len(sequence) + room - settings.length
  if excess > 0 and settings.too_long == 'refuse':
    return _too_long(len(sequence) + room, settings)
  sequence = sequence[max(excess, 0) :]
  prefix = len(sequence) if settings.architecture == 'prefix' else 0
  return [Row(number, tuple(sequence), prefix=prefix, cut=max(excess, 0))]


def _too_long(tokens: int, settings: Settings) -> Failed:
  return Failed(
    f"{tokens} tokens do not fit the length {settings.length}; too_long='cut' would leave out the left "
    'of the context.'
  )
