"""Reads prompts in pieces, so that other requests need not wait for a long prompt, and caches the results.

A prompt that begins with an earlier one, as the next turn of a conversation does, continues from the cache of
the earlier prompt. Short prompts can be read in groups.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.inference import programs
from research.inference.decode import Cache
from research.inference.padding import padded_length
from research.inference.request import Request

Result = tuple[jax.Array, Cache]  # (logits [1, vocab] after the prompt, cache of one row)


Piece = Callable[[list[Result]], list[Result]]


class Reading:
  """Prompts that are being read. `results`, one for each, are complete once `done` is True."""

  def __init__(self, pieces: list[Piece], results: list[Result] = ()):
    self._pieces = collections.deque(pieces)
    self.results = list(results)

  @property
  def done(self) -> bool:
    return not self._pieces

  def step(self) -> None:
    """Reads the next piece."""
    self.results = self._pieces.popleft()(self.results)


class PromptReader:
  """Plans how prompts are read.

  Args:
    first: reads the beginnings of the prompts of one or `together` requests; returns logits and cache with a
      row for each.
    more: reads tokens [1, length] after a cache, which it may update in place.
    chunk: the most tokens of a piece.
    kept: how many results are kept for longer prompts; 0 for none. The last result is always kept, for equal
      prompts (several samples of one prompt).
    together: how many prompts of at most `chunk` tokens are read at once.
  """

  def __init__(
    self,
    first: Callable[[Sequence[tuple[int, ...]], Sequence[Request]], Result],
    more: Callable[[np.ndarray, Cache], Result],
    chunk: int,
    kept: int = 0,
    together: int = 1,
  ):
    self.first = first
    self.more = more
    self.chunk = chunk
    self.kept = kept
    self.together = together
    self._results: collections.OrderedDict[tuple, Result] = collections.OrderedDict()
    # Each size is a quarter of the one before, so a rest of any length takes few pieces of few different
    # lengths.
    self.sizes = [chunk, *(4**i for i in range(16, -1, -1) if 4**i < chunk)]

  def forget(self) -> None:
    """Drops all results, after the parameters have changed."""
    self._results.clear()

  def group(self, waiting: Iterable[Request], most: int) -> list[int]:
    """Returns which of the requests to read next, by their places: the first, and what is read with it.

    The prompts of a group have the same padded length, so that each is read as it would be in any other group.
    Equal prompts are read once.

    Args:
      waiting: at least one request.
      most: the most requests of the group.
    """
    waiting = iter(waiting)
    first = next(waiting)
    places = [0]
    if not self.fits_a_group(first):
      return places
    length = padded_length(len(first.prompt), self.chunk)
    different = {_key(first)}
    for place, request in enumerate(waiting, 1):
      if len(places) == most:
        break
      same_length = padded_length(len(request.prompt), self.chunk) == length
      if not same_length or not self.fits_a_group(request):
        continue
      if _key(request) not in different:
        if len(different) == self.together:
          break
        different.add(_key(request))
      places.append(place)
    return places

  def fits_a_group(self, request: Request) -> bool:
    """Returns whether a request's prompt is read with others: it is short, and nothing is known of it."""
    is_short = len(request.prompt) <= self.chunk
    return self.together > 1 and is_short and self._longest(request) is None

  def begin(self, requests: Sequence[Request]) -> Reading:
    """Begins to read the prompts of a `group`; a known prompt goes on from what is kept of it."""
    request = requests[0]
    if self.fits_a_group(request):

      def read_group(_):
        return self._read_group(requests)

      return Reading([read_group])
    prompt = request.prompt
    key = self._longest(request)
    if key is None:
      # The piece that is shorter than the others comes first, because only the first may be padded.
      rest = len(prompt) % self.chunk or self.chunk

      def read_first(_):
        return [self.first([prompt[:rest]], [request])]

      sizes = [self.chunk] * ((len(prompt) - rest) // self.chunk)
      return Reading([read_first, *self._pieces(prompt, rest, sizes)])
    self._results.move_to_end(key)
    result = self._results[key]
    start = len(key[0])
    if start == len(prompt):
      return Reading([], [result])
    sizes = []
    rest = len(prompt) - start
    for size in self.sizes:
      sizes += [size] * (rest // size)
      rest %= size
    # `more` updates a cache in place, and this one must stay as it is.
    copied = result[0], jax.tree.map(jnp.copy, result[1])
    return Reading(self._pieces(prompt, start, sizes), [copied])

  def _read_group(self, requests: Sequence[Request]) -> list[Result]:
    """Reads short prompts at once; returns the result of each."""
    different = {_key(request): request for request in requests}
    rows = list(different.values())
    # With fewer rows it would be another program, which rounds differently.
    rows += rows[:1] * (self.together - len(rows))
    logits, cache = self.first([request.prompt for request in rows], rows)
    results = {key: programs.row(logits, cache, place) for place, key in enumerate(different)}
    return [results[_key(request)] for request in requests]

  def keep(self, request: Request, result: Result) -> None:
    """Stores a result, and drops those that were not used for the longest time."""
    self._results[_key(request)] = result
    while len(self._results) > max(1, self.kept):
      self._results.popitem(last=False)

  def _longest(self, request: Request) -> tuple | None:
    """Returns the key of the longest kept prompt that this one begins with."""
    same = _key(request)
    if same in self._results:
      return same
    beginnings = [
      key
      for key in self._results
      if self.kept and key[1] == request.encoder and request.prompt[: len(key[0])] == key[0]
    ]
    return max(beginnings, key=_prompt_length, default=None)

  def _pieces(self, prompt: tuple[int, ...], start: int, sizes: list[int]) -> list[Piece]:
    """Returns the functions that read the prompt from `start` on, in pieces of these sizes."""
    pieces = []
    for size in sizes:
      tokens = np.array([prompt[start : start + size]], np.int32)
      pieces.append(functools.partial(self._read_piece, tokens))
      start += size
    return pieces

  def _read_piece(self, tokens: np.ndarray, results: list[Result]) -> list[Result]:
    return [self.more(tokens, results[0][1])]


def _key(request: Request) -> tuple:
  return request.prompt, request.encoder


def _prompt_length(key: tuple) -> int:
  return len(key[0])
