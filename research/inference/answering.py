"""The interface of everything that answers requests: the engine with slots, beam search, speculation."""

import dataclasses
from collections.abc import Iterator, Sequence

from research.core.errors import UserError
from research.inference.request import Completion, Request


@dataclasses.dataclass(frozen=True)
class Event:
  """The result of one step for a request.

  Attributes:
    number: the request's number, from `submit`.
    text: the text that this step added. It may be empty: text that could still change is held back.
    completion: everything so far.
  """

  number: int
  text: str
  completion: Completion


class Answering:
  """A queue of requests, and the steps that answer them.

  A subclass defines `submit`, `busy` and `step`.

  Attributes:
    room: the most tokens of a request, its prompt included.
    encoder_room: the most tokens that an encoder reads; 0 for a decoder.
  """

  room: int
  encoder_room: int

  def submit(self, request: Request) -> int:
    """Puts a request into the queue and returns its number.

    Raises:
      UserError: the request is longer than the room, or has a token that the model lacks.
    """
    raise NotImplementedError

  @property
  def busy(self) -> bool:
    """Whether any request is active or waits in the queue."""
    raise NotImplementedError

  def step(self) -> list[Event]:
    """Continues the active requests, and returns the results."""
    raise NotImplementedError

  def run(self, requests: Sequence[Request]) -> list[Completion]:
    """Answers requests; returns the completions in the order of the requests."""
    numbers = [self.submit(request) for request in requests]
    done = {}
    while self.busy:
      done |= {event.number: event.completion for event in self.step()}
    return [done[number] for number in numbers]

  def stream(self, request: Request) -> Iterator[str]:
    """Yields the text of one request as it is generated.

    Raises:
      UserError: the request ended with an error.
    """
    number = self.submit(request)
    while self.busy:
      for event in self.step():
        if event.number == number:
          if event.completion.error:
            raise UserError(event.completion.error)
          yield event.text
