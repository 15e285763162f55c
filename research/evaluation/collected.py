"""The answers of one call of an engine, as they come: of several rows to a request, in any order."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from research.evaluation.requests import Answer, Failed, Generation, Likelihood, Request
from research.evaluation.rows import Row
from research.inference.request import Completion

# What is called with the number of a request and its answer, as soon as there is one.
Keep = Callable[[int, Answer], None]


class Collected:
  """The answers so far.

  Args:
    requests: of the call.
    keep: called with each answer, once.

  Attributes:
    answers: in the order of the requests; None where there is none yet.
  """

  def __init__(self, requests: Sequence[Request], keep: Keep):
    self.requests, self.keep = requests, keep
    self.answers: list[Answer | None] = [None] * len(requests)
    self._parts: dict[int, list[tuple[Row, float, bool]]] = collections.defaultdict(list)
    self._expected: dict[int, int] = {}

  def expect(self, number: int, rows: int) -> None:
    self._expected[number] = rows

  def finish(self, number: int, answer: Answer) -> None:
    self.answers[number] = answer
    self.keep(number, answer)

  def add(self, row: Row, nats: np.ndarray, greedy: np.ndarray) -> None:
    """The losses of a row's scored tokens; its request is answered when all of its rows are there."""
    parts = self._parts[row.request]
    parts.append((row, -float(np.sum(nats, dtype=np.float64)), bool(np.all(greedy))))
    if len(parts) == self._expected[row.request]:
      self.finish(row.request, _joined(self._parts.pop(row.request)))


def _joined(parts: list[tuple[Row, float, bool]]) -> Likelihood | Failed:
  """One answer of all the rows of a request."""
  nats = sum(nats for _, nats, _ in parts)
  if not np.isfinite(nats):
    return Failed(f'the log-likelihood is {nats}: the model gives no numbers here.')
  return Likelihood(
    nats,
    sum(row.scored for row, _, _ in parts),
    all(greedy for _, _, greedy in parts),
    max(row.cut for row, _, _ in parts),
  )


def generation_of(completion: Completion, row: Row) -> Generation | Failed:
  if completion.error:
    return Failed(completion.error)
  stopped = completion.finish != 'length'
  return Generation(completion.text, len(completion.tokens), stopped, row.cut)
