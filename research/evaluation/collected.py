"""Collects the answers of one call of an engine. Several rows may answer one request, in any order."""

import collections
from collections.abc import Sequence

import numpy as np

from research.evaluation.callbacks import Keep
from research.evaluation.requests import Answer, Failed, Generation, Likelihood, Request
from research.evaluation.rows import Row
from research.inference.request import Completion


class Collected:
  """The answers so far.

  Args:
    requests: of the call.
    keep: called with each answer, once.

  Attributes:
    answers: in the order of the requests; None where there is none yet.
  """

  def __init__(self, requests: Sequence[Request], keep: Keep):
    self.requests = requests
    self.keep = keep
    self.answers: list[Answer | None] = [None] * len(requests)
    self._parts: dict[int, list[tuple[Row, float, bool]]] = collections.defaultdict(list)
    self._expected: dict[int, int] = {}

  def expect(self, number: int, rows: int) -> None:
    """Says how many rows answer a request."""
    self._expected[number] = rows

  def finish(self, number: int, answer: Answer) -> None:
    """Takes the whole answer to a request."""
    self.answers[number] = answer
    self.keep(number, answer)

  def add(self, row: Row, nats: np.ndarray, greedy: np.ndarray) -> None:
    """Takes the losses [scored] of a row, and finishes its request when all of its rows have come."""
    parts = self._parts[row.request]
    # In float64, because the sum of a long text has many terms.
    parts.append((row, -float(np.sum(nats, dtype=np.float64)), bool(np.all(greedy))))
    if len(parts) == self._expected[row.request]:
      self.finish(row.request, _join(self._parts.pop(row.request)))


def _join(parts: list[tuple[Row, float, bool]]) -> Likelihood | Failed:
  """The answer of all the rows of a request."""
  nats = sum(nats for _, nats, _ in parts)
  if not np.isfinite(nats):
    return Failed(f'the log-likelihood is {nats}: the model gives no numbers here.')
  return Likelihood(
    nats,
    tokens=sum(row.scored for row, _, _ in parts),
    greedy=all(greedy for _, _, greedy in parts),
    cut=max(row.cut for row, _, _ in parts),
  )


def to_generation(completion: Completion, row: Row) -> Generation | Failed:
  """The answer that a completion of the inference engine gives."""
  if completion.error:
    return Failed(completion.error)
  stopped = completion.finish != 'length'
  return Generation(completion.text, len(completion.tokens), stopped, row.cut)
