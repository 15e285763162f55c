"""Requests answered one at a time, each by one compiled program: beam search, or speculation."""

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
from research.inference.padding import padded_length, padded_row
from research.inference.request import Completion, Request
from research.inference.request_check import check_model, check_request
from research.inference.text import TextStream

# The tokens of an answer to a request, which is given as a batch of one row.
Method = Callable[[dict, Request], list[int]]


@dataclasses.dataclass(frozen=True)
class Beams:
  """The likeliest of `beams` beams (`beams.beam_search`).

  Attributes:
    graphdef, params: the model.
    beams: how many are followed.
    penalty: of the length.
  """

  graphdef: nnx.GraphDef
  params: dict
  beams: int
  penalty: beams.Penalty = beams.by_length

  def __call__(self, batch: dict, request: Request) -> list[int]:
    tokens, _ = beams.search(
      self.graphdef, self.params, batch, request.max_tokens, beams=self.beams,
      ends=tuple(request.stop_tokens), penalty=self.penalty,
    )  # fmt: skip
    best = np.asarray(tokens)[0, 0].tolist()
    ends = [place for place, token in enumerate(best) if token in request.stop_tokens]
    return best[: ends[0] + 1] if ends else best

  def check(self, request: Request) -> None:
    """Raises where a request asks for what beams do not do."""
    if request.sampling.draws or request.sampling.penalises or request.sampling.logit_bias:
      raise UserError('beams take the likeliest tokens: ask for no temperature, penalty or bias.')


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Tokens that a draft guesses and the model checks (`speculate.speculate`).

  Attributes:
    graphdef, params: the model.
    draft: the graph of a smaller model, or `Ngram`.
    draft_params: of the smaller model.
    guesses: for each step of the model.
  """

  graphdef: nnx.GraphDef
  params: dict
  draft: nnx.GraphDef | speculate.Ngram
  draft_params: dict | None = None
  guesses: int = 4

  def __call__(self, batch: dict, request: Request) -> list[int]:
    # The seed is an array, so that samples share a compiled program.
    seeds = jnp.array([request.sampling.seed], jnp.uint32)
    said = speculate.compiled(
      self.graphdef, self.params, self.draft, self.draft_params, batch, request.max_tokens, seeds,
      settings=dataclasses.replace(request.sampling, seed=0), guesses=self.guesses,
      ends=tuple(request.stop_tokens),
    )  # fmt: skip
    return np.asarray(said.tokens)[0, : int(said.length[0])].tolist()

  def check(self, request: Request) -> None:
    """Raises where a request asks for what a draft does not go with."""
    speculate.check_settings(request.sampling, self.guesses)


class OneByOne(Answering):
  """Answers each request by one call of a method. The whole text comes at once.

  Args:
    method: `Beams` or `Speculation`; its parameters are taken as `decode.separated` gives them.
    decode: token ids to text; None to answer with ids alone.
    room, encoder_room: as of `Engine`.
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
    self.method, self.decode, self.vocab = _separated(method), decode, model.vocab
    self.room, self.encoder_room, self.prefix = room, encoder_room, prefix
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._count = 0

  def submit(self, request: Request) -> int:
    check_request(request, self.vocab, self.room, self.encoder_room, self.decode is not None)
    if request.top or request.mask is not None:
      field = 'top' if request.top else 'mask'
      raise Invalid(Request, field, 'it goes with neither beams nor a draft.')
    self.method.check(request)
    self._waiting.append((self._count, request))
    self._count += 1
    return self._count - 1

  @property
  def busy(self) -> bool:
    return bool(self._waiting)

  def step(self) -> list[Event]:
    number, request = self._waiting.popleft()
    # The answer follows its prompt, so the padding may not take the answer's room.
    length = padded_length(len(request.prompt), self.room - request.max_tokens)
    batch = padded_row('decoder', request.prompt, length)
    if self.prefix:
      batch['decoder_causal_attention'] = batch['decoder_segment_ids']
    if self.encoder_room:
      batch |= padded_row('encoder', request.encoder, self.encoder_room)
    completion = self._completion(request, self.method(batch, request))
    return [Event(number, completion.text, completion)]

  def _completion(self, request: Request, tokens: list[int]) -> Completion:
    """The tokens up to a stop string, with their text."""
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
  """The method with parameters as the backend reads them fastest."""
  graphdef, params = decode.for_backend(method.graphdef, method.params)
  changed = {'graphdef': graphdef, 'params': params}
  if isinstance(method, Speculation) and isinstance(method.draft, nnx.GraphDef):
    draft, draft_params = decode.for_backend(method.draft, method.draft_params)
    changed |= {'draft': draft, 'draft_params': draft_params}
  return dataclasses.replace(method, **changed)
