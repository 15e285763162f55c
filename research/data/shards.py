"""Frozen streams on disk: rows of the smallest unsigned integers, in shards, and facts about each shard.

A shard is two files: NAME.bin has the rows one after the other, and NAME.json the facts about them. The JSON
file is written last, so a shard is complete once it exists. Shards are numbered by pass and piece; a stream is
the shards 0, 1, ... of each pass.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib

import numpy as np

from research.core import storage
from research.core.errors import UserError


def shard_name(number: int, piece: int) -> str:
  """Returns the file name of pass `number` over piece `piece`."""
  return f'pass{number}-{piece:05d}.bin'


def write_json(path: pathlib.Path, value):
  """Writes a JSON file whole or not at all."""
  storage.write_atomic(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def locked(path: pathlib.Path, log):
  """Holds a lock file, so that one process writes at a time. The system releases the lock of a dead process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f'waiting for another process that writes {path.stem}')
      fcntl.flock(f, fcntl.LOCK_EX)
    yield


def facts_of(folder: pathlib.Path, number: int, examples: int | None) -> list[dict] | None:
  """Returns the facts of the shards with the first `examples` of a pass (all of them for None).

  Returns None if some of these shards are not written yet.
  """
  shards = []
  examples_so_far = 0
  while True:
    path = folder / shard_name(number, len(shards))
    try:
      facts = json.loads(path.with_suffix('.json').read_text())
    except FileNotFoundError:
      return None
    shards.append(facts | {'file': path.name})
    examples_so_far += facts['examples']
    if facts['last'] or (examples is not None and examples_so_far >= examples):
      return shards


def is_written(folder: pathlib.Path, number: int, piece: int) -> bool:
  """Returns whether the shard of pass `number` over `piece` is complete."""
  return (folder / shard_name(number, piece)).with_suffix('.json').exists()


def complete(folder: pathlib.Path, passes: int, examples: int | None) -> bool:
  """Returns whether a stream has all shards of every pass."""
  if not (folder / 'header.json').exists():
    return False
  return all(facts_of(folder, number, examples) is not None for number in range(passes))


def row_dtype(features: dict[str, int], vocab_size: int) -> np.dtype:
  """Returns the dtype of an example on disk: each feature in the smallest unsigned integers."""

  def smallest(key, length):
    if key.endswith('_tokens'):
      return np.uint16 if vocab_size <= 1 << 16 else np.uint32
    if key.endswith(('_segment_ids', '_positions')):
      return np.uint16 if length <= 1 << 16 else np.uint32
    return np.uint8

  return np.dtype([(k, smallest(k, n), (n,)) for k, n in sorted(features.items())])


class Shard:
  """Writes a shard. It is a context manager: after an error the shard does not exist.

  Args:
    folder: the folder of the stream.
    number: the number of the pass.
    piece: the number of the piece of text.
    token_bytes: (vocab_size,) bytes of text per id.
    last: whether this is the last piece of the pass.
  """

  def __init__(self, folder: pathlib.Path, number: int, piece: int, token_bytes, last: bool):
    self.path = folder / shard_name(number, piece)
    self.partial = self.path.with_suffix('.partial')
    self.token_bytes = token_bytes
    self.hash = hashlib.sha256()
    self.facts = {'examples': 0, 'target_tokens': 0, 'target_bytes': 0, 'positions': 0}
    self.last = last
    self.dtype = None  # known from the first rows

  def __enter__(self):
    self.file = open(self.partial, 'wb')
    return self

  def write(self, rows: dict[str, np.ndarray]) -> int:
    """Appends rows {feature: (n, length)}; returns their number of target tokens."""
    if self.dtype is None:
      lengths = {k: v.shape[1] for k, v in rows.items()}
      self.dtype = row_dtype(lengths, len(self.token_bytes))
    n = len(next(iter(rows.values())))
    table = np.empty(n, self.dtype)
    for key, value in rows.items():
      low = value.min(initial=0)
      high = value.max(initial=0)
      if low < 0 or high > np.iinfo(self.dtype[key].base).max:
        raise UserError(f'cannot store {key}: its values go from {low} to {high}.')
      table[key] = value
    data = table.tobytes()
    # Hashed before it is written, so that the file need not be read again.
    self.file.write(data)
    self.hash.update(data)
    side = 'encoder' if 'encoder_target_tokens' in rows else 'decoder'
    weights = rows[f'{side}_loss_weights']
    sizes = self.token_bytes[rows[f'{side}_target_tokens']]
    tokens = int(weights.sum())
    self.facts['examples'] += n
    self.facts['positions'] += weights.size
    self.facts['target_tokens'] += tokens
    self.facts['target_bytes'] += int((sizes * weights).sum())
    return tokens

  def __exit__(self, kind, *_):
    self.file.flush()
    os.fsync(self.file.fileno())
    self.file.close()
    if kind is not None:
      return
    os.replace(self.partial, self.path)
    names = self.dtype.names if self.dtype else ()
    features = [[k, self.dtype[k].base.name, self.dtype[k].shape[0]] for k in names]
    facts = {'sha256': self.hash.hexdigest(), 'features': features, 'last': self.last}
    write_json(self.path.with_suffix('.json'), self.facts | facts)
