"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Callable, Sequence

BEFORE = (
  8  # tokens of the prompt that are decoded too: some tokenizers drop the space of a first word
)


class TextStream:
  """The text of one request.

  Args:
    decode: token ids to text.
    prompt: what came before; only its last tokens are looked at.
    stop: strings that end the text, also where they lie across tokens.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], prompt: Sequence[int] = (), stop: Sequence[str] = ()
  ):
    self.decode, self.stop = decode, tuple(stop)
    self.before = list(prompt[-BEFORE:])
    self.tokens: list[int] = []
    self.text = ''  # all of it, as far as it is sure
    self.stopped = False

  def add(self, token: int) -> str:
    """The text that this token makes sure, which may be empty. `stopped` says whether a stop string came."""
    self.tokens.append(token)
    whole = self._decoded()
    places = [whole.index(stop) for stop in self.stop if stop in whole]
    if places:
      self.stopped = True
      return self._up_to(whole[: min(places)])
    sure = len(whole) - self._unsure(whole)
    return self._up_to(whole[:sure])

  def finish(self) -> str:
    """What was held back, when no token follows."""
    return '' if self.stopped else self._up_to(self._decoded())

  def _up_to(self, text: str) -> str:
    new = text[len(self.text) :]
    self.text += new
    return new

  def _decoded(self) -> str:
    prefix = self.decode(self.before) if self.before else ''
    whole = self.decode(self.before + self.tokens)
    if whole.startswith(prefix):
      return whole[len(prefix) :]
    return self.decode(self.tokens)  # the prompt ends within a character

  def _unsure(self, text: str) -> int:
    """How many of the last characters may still change or begin a stop string."""
    # A character of several tokens is shown as U+FFFD until its last token has come.
    half = len(text) - len(text.rstrip('\ufffd'))
    longest = max((len(stop) - 1 for stop in self.stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
      if any(stop.startswith(text[-length:]) for stop in self.stop):
        return max(half, length)
    return half
