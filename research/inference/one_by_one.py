"""Answers requests one at a time, each by one compiled program: beam search or speculative decoding."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError
from research.inference import beams, decode, speculate
from research.inference.answering import Answering, Event
from research.inference.ngrams import Ngram
from research.inference.padding import padded_length, padded_rows
from research.inference.request import NOT_NUMBERS, Completion, Request
from research.inference.request_check import check_model, check_request
from research.inference.text import TextStream

# Returns the tokens of the answer to a request, or None if the logits were not numbers. The batch has the
# request's prompt, as one row.
Method = Callable[[dict, Request], list[int] | None]


@dataclasses.dataclass(frozen=True)
class Beams:
  """Answers by the likeliest text of a beam search (`beams.beam_search`).

  Attributes:
    graphdef: the structure of the model.
    params: its parameters.
    beams: how many beams are followed.
    penalty: the length penalty.
  """

  graphdef: nnx.GraphDef
  params: dict
  beams: int
  penalty: beams.Penalty = beams.by_length

  def __call__(self, batch: dict, request: Request) -> list[int] | None:
    tokens, scores = beams.search(
      self.graphdef, self.params, batch, request.max_tokens, beams=self.beams,
      ends=tuple(request.stop_tokens), penalty=self.penalty,
    )  # fmt: skip
    if not scores[0, 0] > beams.NEVER:  # no beam was finished, or its score is NaN
      return None
    best = np.asarray(tokens)[0, 0].tolist()
    ends = [place for place, token in enumerate(best) if token in request.stop_tokens]
    return best[: ends[0] + 1] if ends else best

  def check(self, request: Request) -> None:
    """Raises UserError if a request has settings that beams do not support."""
    if request.sampling.draws or request.sampling.penalises or request.sampling.logit_bias:
      raise UserError(
        'beam search finds the likeliest text: leave out temperature, penalties and biases.'
      )


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Answers by speculative decoding: a draft guesses tokens, and the model checks them (`speculate.speculate`).

  Attributes:
    graphdef: the structure of the model.
    params: its parameters.
    draft: the structure of a smaller model, or `Ngram`.
    draft_params: the parameters of the smaller model.
    guesses: tokens that are guessed per step of the model.
  """

  graphdef: nnx.GraphDef
  params: dict
  draft: nnx.GraphDef | Ngram
  draft_params: dict | None = None
  guesses: int = 4

  def __call__(self, batch: dict, request: Request) -> list[int] | None:
    continuation = self.continuation(batch, request)
    tokens = np.asarray(continuation.tokens)[0, : int(continuation.length[0])].tolist()
    return None if speculate.NOT_A_TOKEN in tokens else tokens

  def continuation(self, batch: dict, request: Request) -> speculate.Continuations:
    """Returns the tokens and the number of steps that they took; see `__call__`."""
    # The seed is an array and not part of the static settings, so that samples share a compiled program.
    seeds = jnp.array([request.sampling.seed], jnp.uint32)
    return speculate.compiled(
      self.graphdef, self.params, self.draft, self.draft_params, batch, request.max_tokens, seeds,
      settings=dataclasses.replace(request.sampling, seed=0), guesses=self.guesses,
      ends=tuple(request.stop_tokens),
    )  # fmt: skip

  def check(self, request: Request) -> None:
    """Raises UserError if a request has settings that speculation does not support."""
    speculate.check_settings(request.sampling, self.guesses)


class OneByOne(Answering):
  """Answers each request by one call of a method, so its whole text comes at once.

  Args:
    method: `Beams` or `Speculation`.
    decode: maps token ids to text; None to answer with ids alone.
    room, encoder_room, prefix: as for `Engine`.
  """

  def __init__(
    self,
    method: Beams | Speculation,
    *,
    decode: Callable[[list[int]], str] | None = None,
    room: int = 512,
    encoder_room: int = 0,
    prefix: bool = False,
  ):
    model = jax.eval_shape(lambda params: nnx.merge(method.graphdef, params), method.params)
    check_model(OneByOne, model, room, encoder_room)
    self.method = _separated(method)
    self.decode = decode
    self.vocab = model.vocab
    self.room = room
    self.encoder_room = encoder_room
    self.prefix = prefix
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._count = 0

  def submit(self, request: Request) -> int:
    check_request(request, self.vocab, self.room, self.encoder_room, self.decode is not None)
    if request.top or request.mask is not None:
      field = 'top' if request.top else 'mask'
      raise Invalid(Request, field, 'it works with neither beams nor a draft; leave it out.')
    self.method.check(request)
    self._waiting.append((self._count, request))
    self._count += 1
    return self._count - 1

  @property
  def busy(self) -> bool:
    return bool(self._waiting)

  def step(self) -> list[Event]:
    number, request = self._waiting.popleft()
    completion = self._completion(request, self.method(self.batch(request), request))
    return [Event(number, completion.text, completion)]

  def batch(self, request: Request) -> dict[str, np.ndarray]:
    """Returns the prompt of a request as a padded batch of one row."""
    # The answer follows the padded prompt, so the padding must leave room for it.
    length = padded_length(len(request.prompt), self.room - request.max_tokens)
    batch = padded_rows('decoder', [request.prompt], length)
    if self.prefix:
      batch['decoder_causal_attention'] = batch['decoder_segment_ids']
    if self.encoder_room:
      batch |= padded_rows('encoder', [request.encoder], self.encoder_room)
    return batch

  def _completion(self, request: Request, tokens: list[int] | None) -> Completion:
    """Returns the completion of these tokens, up to a stop token or a stop string."""
    if tokens is None:
      return Completion(finish='error', error=NOT_NUMBERS)
    completion = Completion()
    stream = None
    if self.decode is not None:
      stream = TextStream(self.decode, () if self.encoder_room else request.prompt, request.stop)
    for token in tokens:
      completion.tokens.append(token)
      if token in request.stop_tokens:
        completion.finish = 'stop_token'
        break
      if stream is not None:
        stream.add(token)
        if stream.stopped:
          completion.finish = 'stop'
          break
    completion.finish = completion.finish or 'length'
    if stream is not None:
      stream.finish()
      completion.text = stream.text
    return completion


def _separated(method: Beams | Speculation) -> Beams | Speculation:
  """Returns the method with its models in the form that the backend decodes fastest."""
  graphdef, params = decode.for_backend(method.graphdef, method.params)
  changed = {'graphdef': graphdef, 'params': params}
  if isinstance(method, Speculation) and isinstance(method.draft, nnx.GraphDef):
    draft, draft_params = decode.for_backend(method.draft, method.draft_params)
    changed |= {'draft': draft, 'draft_params': draft_params}
  return dataclasses.replace(method, **changed)
