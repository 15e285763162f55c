"""Reads prompts in pieces, so that other requests need not wait for a long prompt, and caches the results.

A prompt that begins with an earlier one, as the next turn of a conversation does, continues from the cache of
the earlier prompt.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.inference.decode import Cache
from research.inference.request import Request

Result = tuple[jax.Array, Cache]  # (logits [1, vocab] after the prompt, cache of one row)


class Reading:
  """A prompt that is being read. `result` is complete once `done` is True."""

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
  """Plans how prompts are read.

  Args:
    first: reads the beginning of a request's prompt.
    more: reads tokens [1, length] after a cache, which it may update in place.
    chunk: the most tokens of a piece.
    kept: how many results are kept for longer prompts; 0 for none. The last result is always kept, for equal
      prompts (several samples of one prompt).
  """

  def __init__(
    self,
    first: Callable[[tuple[int, ...], Request], Result],
    more: Callable[[np.ndarray, Cache], Result],
    chunk: int,
    kept: int = 0,
  ):
    self.first = first
    self.more = more
    self.chunk = chunk
    self.kept = kept
    self._results: collections.OrderedDict[tuple, Result] = collections.OrderedDict()
    # Each size is a quarter of the one before, so a rest of any length takes few pieces of few different
    # lengths.
    self.sizes = [chunk, *(4**i for i in range(16, -1, -1) if 4**i < chunk)]

  def forget(self) -> None:
    """Drops all results, after the parameters have changed."""
    self._results.clear()

  def begin(self, request: Request) -> Reading:
    """Begins to read a request's prompt, after the longest kept prompt that it begins with."""
    prompt = request.prompt
    key = self._longest(request)
    if key is None:
      # The piece that is shorter than the others comes first, because only the first may be padded.
      rest = len(prompt) % self.chunk or self.chunk

      def read_first(_):
        return self.first(prompt[:rest], request)

      sizes = [self.chunk] * ((len(prompt) - rest) // self.chunk)
      return Reading([read_first, *self._pieces(prompt, rest, sizes)])
    self._results.move_to_end(key)
    result = self._results[key]
    start = len(key[0])
    if start == len(prompt):
      return Reading([], result)
    sizes = []
    rest = len(prompt) - start
    for size in self.sizes:
      sizes += [size] * (rest // size)
      rest %= size
    # `more` updates a cache in place, and this one must stay as it is.
    copied = result[0], jax.tree.map(jnp.copy, result[1])
    return Reading(self._pieces(prompt, start, sizes), copied)

  def keep(self, request: Request, result: Result) -> None:
    """Stores a result, and drops those that were not used for the longest time."""
    self._results[request.prompt, request.encoder] = result
    while len(self._results) > max(1, self.kept):
      self._results.popitem(last=False)

  def _longest(self, request: Request) -> tuple | None:
    """Returns the key of the longest kept prompt that this one begins with."""
    same = request.prompt, request.encoder
    if same in self._results:
      return same
    beginnings = [
      key
      for key in self._results
      if self.kept and key[1] == request.encoder and request.prompt[: len(key[0])] == key[0]
    ]
    return max(beginnings, key=_prompt_length, default=None)

  def _pieces(self, prompt: tuple[int, ...], start: int, sizes: list[int]) -> list:
    """Returns the functions that read the prompt from `start` on, in pieces of these sizes."""
    pieces = []
    for size in sizes:
      tokens = np.array([prompt[start : start + size]], np.int32)
      pieces.append(functools.partial(self._read_piece, tokens))
      start += size
    return pieces

  def _read_piece(self, tokens: np.ndarray, result: Result) -> Result:
    return self.more(tokens, result[1])


def _prompt_length(key: tuple) -> int:
  return len(key[0])
