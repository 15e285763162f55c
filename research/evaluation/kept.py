"""Keeps answers as they come, so that a task that was killed does not repeat a request that was answered."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from research.core import storage
from research.evaluation.callbacks import Progress, no_progress
from research.evaluation.engine import Engine
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
  """An engine that writes every answer to a file, a JSON line each, and asks only for those that are missing.

  Equal requests are asked once. An answer depends on its request alone (see `engine`), so a task that was
  interrupted ends with the numbers of one that was not.

  Args:
    path: of the file. Answers that another `identity` left there are thrown away.
    identity: what the answers depend on, as JSON values: checkpoint, settings, task.

  Attributes:
    resumed: how many answers were there before.
  """

  def __init__(self, engine: Engine, path: pathlib.Path, identity: dict):
    self.engine = engine
    self.path = path
    self.encoding = engine.encoding
    self.settings = engine.settings
    self.answers: dict[str, Answer] = {}
    header = {'of': hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    lines = storage.read_rows(path)
    if lines[:1] == [header]:
      self.answers = {line.pop('request'): from_json(line) for line in lines[1:]}
    self.resumed = len(self.answers)
    # A kill may have cut the last line short, so the file is written anew.
    text = ''.join(json.dumps(line) + '\n' for line in [header, *map(self._line, self.answers)])
    storage.write_atomic(path, text)

  def _line(self, key: str) -> dict:
    return {'request': key, **to_json(self.answers[key])}

  def answer(self, requests: Sequence[Request], progress: Progress = no_progress) -> list[Answer]:
    """As `Engine.answer`."""
    keys = [digest(request) for request in requests]
    missing = {
      key: request for key, request in zip(keys, requests, strict=True) if key not in self.answers
    }
    missing_keys = list(missing)
    with storage.appending(self.path) as file:

      def keep(number: int, answer: Answer) -> None:
        key = missing_keys[number]
        self.answers[key] = answer
        file.write(json.dumps(self._line(key)) + '\n')
        file.flush()

      self.engine.answer(list(missing.values()), progress, keep)
    return [self.answers[key] for key in keys]


def digest(request: Request) -> str:
  """A key of a request: equal requests have equal keys, in every process."""
  return hashlib.sha256(repr(request).encode()).hexdigest()[:24]


def to_json(answer: Answer) -> dict:
  """An answer as JSON values."""
  fields = dataclasses.asdict(answer)
  if isinstance(answer, Embedding):
    fields['vector'] = answer.vector.tolist()
  return {'kind': type(answer).__name__, **fields}


def from_json(fields: dict) -> Answer:
  """The answer that `to_json` wrote."""
  fields = dict(fields)
  kind = KINDS[fields.pop('kind')]
  if kind is Embedding:
    fields['vector'] = np.array(fields['vector'], np.float32)
  return kind(**fields)
