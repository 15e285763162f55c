"""Answers that are kept as they come, so that a task that was killed does not ask again what was answered."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from research.core import storage
from research.evaluation.engine import Engine, Progress
from research.evaluation.requests import (
  Answer,
  Embedding,
  Failed,
  Generation,
  Likelihood,
  Request,
)

KINDS = {kind.__name__: kind for kind in (Likelihood, Generation, Embedding, Failed)}


class KeptAnswers:
  """An engine that writes every answer to a file, a JSON line each, and asks only for what is missing there.

  Equal requests are asked once. An answer does not depend on its company (`engine`), so a task that goes on
  gives what it would have given in one piece.

  Args:
    path: of the file. What another `identity` left there is thrown away.
    identity: what the answers are of, as JSON values: checkpoint, settings, task.
  """

  def __init__(self, engine: Engine, path: pathlib.Path, identity: dict):
    self.engine, self.path = engine, path
    self.encoding, self.settings = engine.encoding, engine.settings
    self.answers: dict[str, Answer] = {}
    self.resumed = 0  # answers that were there before
    first = {'of': hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    lines = storage.read_rows(path)
    if lines[:1] == [first]:
      self.answers = {line.pop('request'): read_answer(line) for line in lines[1:]}
      self.resumed = len(self.answers)
    # Written anew: the last line may have been cut short.
    text = ''.join(json.dumps(line) + '\n' for line in [first, *map(self._line, self.answers)])
    storage.write_atomic(path, text)

  def _line(self, key: str) -> dict:
    return {'request': key, **as_plain(self.answers[key])}

  def answer(
    self, requests: Sequence[Request], progress: Progress = lambda done, of: None
  ) -> list[Answer]:
    """As `Engine.answer`."""
    keys = [digest(request) for request in requests]
    missing = {
      key: request for key, request in zip(keys, requests, strict=True) if key not in self.answers
    }
    names = list(missing)
    with storage.appending(self.path) as file:

      def keep(number: int, answer: Answer) -> None:
        self.answers[names[number]] = answer
        file.write(json.dumps(self._line(names[number])) + '\n')
        file.flush()

      self.engine.answer(list(missing.values()), progress, keep)
    return [self.answers[key] for key in keys]


def digest(request: Request) -> str:
  """A name for a request: equal requests have equal names, in every process."""
  return hashlib.sha256(repr(request).encode()).hexdigest()[:24]


def as_plain(answer: Answer) -> dict:
  """An answer as JSON values."""
  fields = dataclasses.asdict(answer)
  if isinstance(answer, Embedding):
    fields['vector'] = answer.vector.tolist()
  return {'kind': type(answer).__name__, **fields}


def read_answer(fields: dict) -> Answer:
  """The answer of `as_plain`."""
  fields = dict(fields)
  kind = KINDS[fields.pop('kind')]
  if kind is Embedding:
    fields['vector'] = np.array(fields['vector'], np.float32)
  return kind(**fields)
