"""Turns tokens into text as they are generated: only whole characters, and no beginning of a stop string."""

from collections.abc import Callable, Sequence

# Tokens of the prompt that are decoded with the answer: some tokenizers drop the space before a first word.
BEFORE = 8


class TextStream:
  """The text of one request.

  Args:
    decode: maps token ids to text.
    prompt: the ids before the answer; only the last ones are used.
    stop: strings that end the text; they may span several tokens.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], prompt: Sequence[int] = (), stop: Sequence[str] = ()
  ):
    self.decode = decode
    self.stop = tuple(stop)
    self.before = list(prompt[-BEFORE:])
    self.tokens: list[int] = []
    self.text = ''  # all text that cannot change any more
    self.stopped = False

  def add(self, token: int) -> str:
    """Adds a token; returns the new text that cannot change any more, and sets `stopped` at a stop string."""
    self.tokens.append(token)
    whole = self._decoded()
    places = [whole.index(stop) for stop in self.stop if stop in whole]
    if places:
      self.stopped = True
      return self._up_to(whole[: min(places)])
    sure = len(whole) - self._unsure(whole)
    return self._up_to(whole[:sure])

  def finish(self) -> str:
    """Returns the text that was held back; call it when no token follows."""
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
    """Returns how many of the last characters may still change, or may begin a stop string."""
    # Tokenizers decode the first tokens of a character of several tokens as U+FFFD.
    whole = text.rstrip('\ufffd')
    half = len(text) - len(whole)
    longest = max((len(stop) - 1 for stop in self.stop), default=0)
    for length in range(min(longest, len(whole)), 0, -1):
      # The character that is not whole yet may be the stop string's next one.
      if any(stop.startswith(whole[-length:]) for stop in self.stop):
        return half + length
    return half
