"""The files through which the tasks of `tasks.shuffle` pass documents on, by split and first byte of the key.

They lie in one folder that all hosts share. `Segment` writes what was read, a sorted bucket holds what `sort`
made of it, and `left` gives the documents that no later stage dropped.
"""

import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from research.core import storage
from tasks import store

BUCKETS = 256  # a power of 2, up to 256: documents are divided by the first bits of their keys
SEGMENT = 64 << 20  # bytes of text that are held before they are written
ORDER = ('validation', 'train')  # the order in which documents are screened


class Segment:
  """Documents of one source in memory, which go to a file of their own whenever they are SEGMENT bytes."""

  def __init__(self, work: pathlib.Path, source: int):
    self.work = work
    self.source = source
    self.number = 0
    self._empty()

  def _empty(self):
    self.records: list[list[bytes]] = [[] for _ in range(len(ORDER) * BUCKETS)]
    self.size = 0

  def add(self, split: str, key: bytes, text: bytes):
    records = self.records[ORDER.index(split) * BUCKETS + key[0] * BUCKETS // 256]
    records.append(key + struct.pack('<Q', len(text)) + text)
    self.size += len(text)
    if self.size > SEGMENT:
      self.write()

  def write(self):
    parts = [b''.join(records) for records in self.records]
    stem = self.work / f'segment-{self.source:06d}-{self.number:04d}'
    storage.write_atomic(stem.with_suffix('.bin'), b''.join(parts))
    save(stem.with_suffix('.npy'), np.cumsum([0, *map(len, parts)]))
    self.number += 1
    self._empty()


def spooled(work: pathlib.Path, split: str, bucket: int) -> Iterator[tuple[bytes, bytes]]:
  """(key, text) of every document that `read` put into this bucket."""
  place = ORDER.index(split) * BUCKETS + bucket
  for path in sorted(work.glob('segment-*.npy')):
    start, end = np.load(path, mmap_mode='r')[place : place + 2]
    with path.with_suffix('.bin').open('rb') as file:
      file.seek(start)
      yield from store.records(file.read(end - start))


def stem_of(work: pathlib.Path, split: str, bucket: int) -> pathlib.Path:
  """The path of a sorted bucket, to which each of its files adds a suffix."""
  return work / f'{split}-{bucket:03d}'


def files_of(work: pathlib.Path, suffix: str) -> list[pathlib.Path]:
  """The files of every bucket, in the order of screening."""
  return [stem_of(work, s, bucket).with_suffix(suffix) for s in ORDER for bucket in range(BUCKETS)]


def keys_of(work: pathlib.Path, split: str, bucket: int) -> np.ndarray:
  """The keys of a sorted bucket: uint8 (documents, 16)."""
  return np.load(stem_of(work, split, bucket).with_suffix('.keys.npy'))


def first_eight(keys: np.ndarray) -> np.ndarray:
  """The first eight bytes of keys (n, 16) as numbers."""
  return np.ascontiguousarray(keys[:, :8]).view('>u8').ravel().astype(np.uint64)


def left(
  work: pathlib.Path, split: str, bucket: int, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes]]:
  """(row, text) of the documents of a bucket that no stage dropped so far, from row `start` up to `end`."""
  stem = stem_of(work, split, bucket)
  ends = np.load(stem.with_suffix('.ends.npy'))
  dropped = dropped_rows(work, split, bucket, len(ends))
  begins = np.concatenate([np.zeros(1, np.int64), ends])
  with stem.with_suffix('.txt').open('rb') as file:
    file.seek(begins[start])
    for row in range(start, len(ends) if end is None else end):
      text = file.read(ends[row] - begins[row])
      if row not in dropped:
        yield row, text


def dropped_rows(work: pathlib.Path, split: str, bucket: int, rows: int) -> set[int]:
  """The rows of a bucket that are near-duplicates, or that share n-grams with validation."""
  dropped: set[int] = set()
  near = work / 'near.npy'
  if near.exists():
    start = first_number(work, split, bucket)
    numbers = np.load(near, mmap_mode='r')
    low, high = np.searchsorted(numbers, (start, start + rows))
    dropped |= {int(number) - start for number in numbers[low:high]}
  path = work / f'overlap-{bucket:03d}.npy'
  if split == 'train' and path.exists():
    dropped |= set(np.load(path).tolist())
  return dropped


def first_number(work: pathlib.Path, split: str, bucket: int) -> int:
  """The number of a bucket's first document in the order of screening."""
  return int(first_numbers(work)[ORDER.index(split) * BUCKETS + bucket])


@functools.lru_cache(maxsize=1)
def first_numbers(work: pathlib.Path) -> np.ndarray:
  """`first_number` of every bucket; they are fixed when the stage `sort` has ended."""
  counts = [len(np.load(path, mmap_mode='r')) for path in files_of(work, '.ends.npy')]
  return np.cumsum([0, *counts])


def fingerprint(work: pathlib.Path, split: str) -> str:
  """The hash of the keys of a split, in order."""
  whole = hashlib.sha256()
  for bucket in range(BUCKETS):
    keys = keys_of(work, split, bucket)
    dropped = dropped_rows(work, split, bucket, len(keys))
    whole.update(np.delete(keys, sorted(dropped), axis=0).tobytes())
  return whole.hexdigest()[:16]


def save(path: pathlib.Path, array: np.ndarray) -> None:
  """`np.save`, whole or not at all."""
  partial = path.with_name(f'.{path.name}.{os.getpid()}.npy')
  np.save(partial, array)
  partial.replace(path)
