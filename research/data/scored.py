"""What a model says of a stream's examples, computed once and frozen beside them.

A teacher's likeliest tokens, a reference's log-probabilities: with these in the rows a step of training holds
one model. They lie in files of their own, named by the stream's content and the model's parameters.
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
  """A frozen stream with features beside its own; has what `Frozen` has."""

  def __init__(self, frozen: Frozen, scores: Scores, cache: pathlib.Path, log):
    """
    Args:
      frozen: the stream.
      scores: what is beside it; computed now where it is not there.
      cache: the folder of all that is frozen.
      log: called with lines of progress.
    """
    super().__init__(frozen.folder, frozen.stream)
    key = digest([self.fingerprint, type(scores).__name__, scores.described()])
    folder = cache / 'scores' / f'{self.stream.name}-{key}'.replace('/', '_').replace(':', '_')
    self._beside, hashes = [], []
    for number in range(self.passes):
      path = folder / f'pass{number}.bin'
      with locked(folder / f'pass{number}.lock', log):
        if not path.with_suffix('.json').exists():
          log(f'scoring {self.stream.name} {self.stream.split}: {len(self):,} examples')
          _write(self, scores, number, path)
      facts = json.loads(path.with_suffix('.json').read_text())
      if told := scores.told(facts['told']):
        log(f'{self.stream.name} {self.stream.split}: {told}')
      self._beside.append(_read(path, facts))
      hashes.append(facts['sha256'])
    dtype = self._beside[0].dtype
    self.features |= {k: (dtype[k].shape, _on_host(dtype[k].base)) for k in dtype.names}
    self.fingerprint = digest([self.fingerprint, hashes])

  def examples(self, indices, number: int = 0) -> Batch:
    """Examples of pass `number`, with the features beside them."""
    rows = super().examples(indices, number)
    beside = self._beside[number][np.asarray(indices)]
    return rows | {k: beside[k].astype(_on_host(beside[k].dtype)) for k in beside.dtype.names}


def _on_host(dtype: np.dtype) -> np.dtype:
  return np.dtype(np.int32 if dtype.kind in 'iu' else np.float32)


def _write(frozen: Frozen, scores: Scores, number: int, path: pathlib.Path) -> None:
  """Writes what `scores` says of pass `number`: whole or not at all."""
  score = scores.scorer()
  partial = path.with_suffix(f'.{os.getpid()}')
  content, told, dtype = hashlib.sha256(), {}, None
  with open(partial, 'wb') as file:
    for first in range(0, len(frozen), scores.batch_size):
      at = np.arange(first, first + scores.batch_size)
      # All batches have one shape, so that one program serves them: the last is filled up.
      rows = Frozen.examples(frozen, np.minimum(at, len(frozen) - 1), number)
      made = {k: np.asarray(v) for k, v in score(rows).items()}
      kept = at < len(frozen)
      rows = {k: v[kept] for k, v in (rows | made).items()}
      if dtype is None:
        dtype = np.dtype([(k, made[k].dtype, made[k].shape[1:]) for k in scores.keys])
      table = np.empty(int(kept.sum()), dtype)
      for key in scores.keys:
        if made[key].dtype.kind == 'f' and not np.isfinite(rows[key]).all():
          raise UserError(
            f'{key}: the model gives numbers that are not finite on {frozen.stream.name}.'
          )
        table[key] = rows[key]
      for name, value in scores.facts(rows).items():
        told[name] = told.get(name, 0.0) + value
      file.write(table.tobytes())
      content.update(table.tobytes())
  os.replace(partial, path)
  features = [[k, dtype[k].base.name, list(dtype[k].shape)] for k in dtype.names]
  facts = {'sha256': content.hexdigest(), 'features': features, 'examples': len(frozen)}
  write_json(path.with_suffix('.json'), facts | {'told': told})


def _read(path: pathlib.Path, facts: dict) -> np.ndarray:
  """The rows of a file, as memory.

  Raises:
    UserError: it is not what was written.
  """
  dtype = np.dtype([(k, d, tuple(shape)) for k, d, shape in facts['features']])
  size = path.stat().st_size if path.exists() else -1
  if size != facts['examples'] * dtype.itemsize:
    raise UserError(f'{path} is not what was written: delete {path.parent} and run again.')
  with open(path, 'rb') as file:
    if hashlib.file_digest(file, 'sha256').hexdigest() != facts['sha256']:
      raise UserError(
        f'{path} was altered since it was written: delete {path.parent} and run again.'
      )
  return np.memmap(path, dtype, 'r')
