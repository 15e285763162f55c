"""A request on its way through an engine."""

import dataclasses

from research.inference.request import NOT_NUMBERS, Completion, Request
from research.inference.text import TextStream


@dataclasses.dataclass(eq=False)
class Work:
  """A request that waits or has a slot.

  Attributes:
    number: of the request.
    request: the request.
    completion: everything so far.
    stream: its text; None to answer with ids alone.
  """

  number: int
  request: Request
  completion: Completion
  stream: TextStream | None

  def record(self, chosen: dict) -> str:
    """Adds a token to the completion, and ends it if it is complete; returns the text that is now certain.

    Args:
      chosen: this row of what `programs.choose` returns.
    """
    request, completion = self.request, self.completion
    if not chosen['numbers']:
      completion.finish = 'error'
      completion.error = NOT_NUMBERS
      return ''
    token = int(chosen['tokens'])
    text = ''
    completion.tokens.append(token)
    completion.logprobs.append(float(chosen['logprobs']))
    pairs = zip(chosen['top_tokens'], chosen['top_logprobs'], strict=True)
    completion.top.append([(int(t), float(p)) for t, p in pairs][: request.top])
    if token in request.stop_tokens:
      completion.finish = 'stop_token'
    elif self.stream is not None:
      text = self.stream.add(token)
      if self.stream.stopped:
        completion.finish = 'stop'
    if not completion.finish and len(completion.tokens) == request.max_tokens:
      completion.finish = 'length'
    if self.stream is not None:
      if completion.finish:
        text += self.stream.finish()
      completion.text = self.stream.text
    return text
