"""Reads prompts in pieces, so that texts under way need not wait for a long one, and keeps what it has read.

A prompt that begins with an earlier one, as the next turn of a conversation does, goes on from what the model
kept of that.
"""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.inference.decode import Cache
from research.inference.request import Request

Result = tuple[jax.Array, Cache]  # (logits [1, vocab] after the prompt, cache of one row)


class Reading:
  """A prompt that is being read. `done` says whether `result` is there."""

  def __init__(self, pieces: list[Callable[[Result | None], Result]], result: Result | None = None):
    self._pieces = collections.deque(pieces)
    self.result = result

  @property
  def done(self) -> bool:
    return not self._pieces

  def step(self) -> None:
    """Reads the next piece."""
    self.result = self._pieces.popleft()(self.result)


class PromptReader:
  """Begins `Reading`s.

  Args:
    first: reads the beginning of a request's prompt.
    more: reads tokens [1, length] behind a cache, which it may change in place.
    chunk: the most tokens of a piece.
    kept: of how many prompts the results are kept for longer ones; 0 for none. The last result serves equal
      prompts in any case.
  """

  def __init__(
    self,
    first: Callable[[tuple[int, ...], Request], Result],
    more: Callable[[np.ndarray, Cache], Result],
    chunk: int,
    kept: int = 0,
  ):
    self.first, self.more, self.chunk, self.kept = first, more, chunk, kept
    self._results: collections.OrderedDict[tuple, Result] = collections.OrderedDict()
    # With four times fewer tokens each, a rest of any length takes few pieces of few lengths.
    self.sizes = [chunk, *(4**i for i in range(16, -1, -1) if 4**i < chunk)]

  def forget(self) -> None:
    """The parameters have changed."""
    self._results.clear()

  def begin(self, request: Request) -> Reading:
    """The reading of a request's prompt, from the longest prompt that was kept and that it begins with."""
    prompt = request.prompt
    key = self._longest(request)
    if key is None:
      # The piece that is shorter than the others comes first, for it alone may be padded.
      rest = len(prompt) % self.chunk or self.chunk
      pieces = [lambda _: self.first(prompt[:rest], request)]
      sizes = [self.chunk] * ((len(prompt) - rest) // self.chunk)
      return Reading([*pieces, *self._pieces(prompt, rest, sizes)])
    self._results.move_to_end(key)
    result, start = self._results[key], len(key[0])
    if start == len(prompt):
      return Reading([], result)
    sizes, rest = [], len(prompt) - start
    for size in self.sizes:
      sizes += [size] * (rest // size)
      rest %= size
    # `more` changes its cache in place, and this one is kept.
    copied = result[0], jax.tree.map(jnp.copy, result[1])
    return Reading(self._pieces(prompt, start, sizes), copied)

  def keep(self, request: Request, result: Result) -> None:
    """Keeps a result, and forgets the one that was used longest ago."""
    self._results[request.prompt, request.encoder] = result
    while len(self._results) > max(1, self.kept):
      self._results.popitem(last=False)

  def _longest(self, request: Request) -> tuple | None:
    """The key of the longest prompt that this one begins with."""
    same = request.prompt, request.encoder
    if same in self._results:
      return same
    beginnings = [
      key
      for key in self._results
      if self.kept and key[1] == request.encoder and request.prompt[: len(key[0])] == key[0]
    ]
    return max(beginnings, key=lambda key: len(key[0]), default=None)

  def _pieces(self, prompt: tuple[int, ...], start: int, sizes: list[int]) -> list:
    pieces = []
    for size in sizes:
      tokens = np.array([prompt[start : start + size]], np.int32)
      pieces.append(lambda result, tokens=tokens: self.more(tokens, result[1]))
      start += size
    return pieces
