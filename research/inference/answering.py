"""What answers requests: the engine with slots, and programs that answer one request as a whole."""

import dataclasses
from collections.abc import Iterator, Sequence

from research.core.errors import UserError
from research.inference.request import Completion, Request


@dataclasses.dataclass(frozen=True)
class Event:
  """What one step did for a request: its text as far as it is sure, and its completion so far."""

  number: int
  text: str
  completion: Completion


class Answering:
  """A queue of requests and the steps that answer them.

  A subclass defines `submit`, `busy` and `step`. `room` is the most tokens of a request, its prompt included;
  `encoder_room` the most tokens that an encoder reads, 0 for a decoder.
  """

  room: int
  encoder_room: int

  def submit(self, request: Request) -> int:
    """Puts a request into the queue; its number.

    Raises:
      UserError: it does not fit the room, or names a token that the model does not have.
    """
    raise NotImplementedError

  @property
  def busy(self) -> bool:
    """Whether any request is at work or waits."""
    raise NotImplementedError

  def step(self) -> list[Event]:
    """Goes on with the requests, and says what came of it."""
    raise NotImplementedError

  def run(self, requests: Sequence[Request]) -> list[Completion]:
    """The answers, in the order of the requests."""
    numbers = [self.submit(request) for request in requests]
    done = {}
    while self.busy:
      done |= {event.number: event.completion for event in self.step()}
    return [done[number] for number in numbers]

  def stream(self, request: Request) -> Iterator[str]:
    """The text of one request as it comes."""
    number = self.submit(request)
    while self.busy:
      for event in self.step():
        if event.number == number:
          if event.completion.error:
            raise UserError(event.completion.error)
          yield event.text
