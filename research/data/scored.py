"""Frozen streams with a model's scores of their examples, which are computed once and frozen beside them.

Scores are a teacher's likeliest tokens or a reference's log-probabilities. With these in the rows a training
step needs only one model in memory. They are in separate files, named by the stream's content and the model's
parameters.
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from research.core.errors import UserError
from research.data.frozen import Batch, Frozen
from research.data.scores import Scores
from research.data.shards import locked, write_json
from research.data.spec import digest


class Scored(Frozen):
  """A frozen stream with the features of its scores added; it has the interface of `Frozen`."""

  def __init__(self, frozen: Frozen, scores: Scores, cache: pathlib.Path, log):
    """
    Args:
      frozen: the stream.
      scores: the scores to add; those that are not frozen yet are computed now.
      cache: the folder of all frozen files.
      log: called with lines of progress.
    """
    super().__init__(frozen.folder, frozen.stream)
    key = digest([self.fingerprint, type(scores).__name__, scores.described()])
    folder = cache / 'scores' / f'{self.stream.name}-{key}'.replace('/', '_').replace(':', '_')
    self._scores = []
    hashes = []
    for number in range(self.passes):
      path = folder / f'pass{number}.bin'
      with locked(folder / f'pass{number}.lock', log):
        if not path.with_suffix('.json').exists():
          log(f'scoring {self.stream.name} {self.stream.split}: {len(self):,} examples')
          _write(self, scores, number, path)
      facts = json.loads(path.with_suffix('.json').read_text())
      summary = scores.summary(facts['told'])
      if summary:
        log(f'{self.stream.name} {self.stream.split}: {summary}')
      self._scores.append(_read(path, facts))
      hashes.append(facts['sha256'])
    dtype = self._scores[0].dtype
    self.features |= {k: (dtype[k].shape, _on_host(dtype[k].base)) for k in dtype.names}
    self.fingerprint = digest([self.fingerprint, hashes])

  def examples(self, indices, number: int = 0) -> Batch:
    """Returns examples of pass `number`, with their scores."""
    rows = super().examples(indices, number)
    scores = self._scores[number][np.asarray(indices)]
    return rows | {k: scores[k].astype(_on_host(scores[k].dtype)) for k in scores.dtype.names}


def _on_host(dtype: np.dtype) -> np.dtype:
  """Returns the dtype in a batch: files have the smallest integers, and the model takes int32."""
  return np.dtype(np.int32 if dtype.kind in 'iu' else np.float32)


def _write(frozen: Frozen, scores: Scores, number: int, path: pathlib.Path) -> None:
  """Writes the scores of pass `number`, whole or not at all.

  Raises:
    UserError: a score is not a finite number.
  """
  score = scores.scorer()
  partial = path.with_suffix(f'.{os.getpid()}')
  content = hashlib.sha256()
  sums = {}
  dtype = None
  with open(partial, 'wb') as file:
    for first in range(0, len(frozen), scores.batch_size):
      indices = np.arange(first, first + scores.batch_size)
      # All batches have the same shape, so that one program serves them: the last is filled with a repeated
      # row.
      rows = Frozen.examples(frozen, np.minimum(indices, len(frozen) - 1), number)
      features = {k: np.asarray(v) for k, v in score(rows).items()}
      real = indices < len(frozen)
      rows = {k: v[real] for k, v in (rows | features).items()}
      if dtype is None:
        dtype = np.dtype([(k, features[k].dtype, features[k].shape[1:]) for k in scores.keys])
      table = np.empty(int(real.sum()), dtype)
      for key in scores.keys:
        if features[key].dtype.kind == 'f' and not np.isfinite(rows[key]).all():
          raise UserError(
            f'{key}: the scores of the model on {frozen.stream.name} are not finite; check its checkpoint.'
          )
        table[key] = rows[key]
      for name, value in scores.facts(rows).items():
        sums[name] = sums.get(name, 0.0) + value
      file.write(table.tobytes())
      content.update(table.tobytes())
  os.replace(partial, path)
  features = [[k, dtype[k].base.name, list(dtype[k].shape)] for k in dtype.names]
  facts = {'sha256': content.hexdigest(), 'features': features, 'examples': len(frozen)}
  write_json(path.with_suffix('.json'), facts | {'told': sums})


def _read(path: pathlib.Path, facts: dict) -> np.ndarray:
  """Maps the rows of a file into memory.

  Raises:
    UserError: the file has changed since it was written.
  """
  dtype = np.dtype([(k, d, tuple(shape)) for k, d, shape in facts['features']])
  size = path.stat().st_size if path.exists() else -1
  if size != facts['examples'] * dtype.itemsize:
    raise UserError(
      f'{path} has another size than it was written with: delete {path.parent} and run again.'
    )
  with open(path, 'rb') as file:
    if hashlib.file_digest(file, 'sha256').hexdigest() != facts['sha256']:
      raise UserError(
        f'{path} was altered since it was written: delete {path.parent} and run again.'
      )
  return np.memmap(path, dtype, 'r')
