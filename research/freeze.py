"""Freeze data streams: seqio task -> fixed-shape examples on disk, which training reads as memory.

    python -m research.freeze --spec=JSON [--cache=DIR]

`research.data` runs this by itself, in a process of its own, when a stream is not there yet. A stream is
a folder of shards, each made from one piece of the corpus and written whole or not at all; a freeze
that was killed goes on with the next shard and ends with the same bytes. This is the one file under
research/ that imports seqio or TensorFlow.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np

from research.errors import UserError
from research.streams import Stream, from_spec


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--spec', required=True, help='JSON: {"streams": [...]} of Stream.spec()')
  parser.add_argument('--cache', required=True, help='folder that holds the frozen streams')
  args = parser.parse_args(argv)
  try:
    streams = [from_spec(s) for s in json.loads(args.spec)['streams']]
    freeze(streams, pathlib.Path(args.cache))
  except UserError as e:
    print(e, file=sys.stderr)
    sys.exit(2)


def freeze(streams: list[Stream], cache: pathlib.Path, log=None):
  """Writes what is missing of every stream under `cache`; progress goes to `log`."""
  log = log or say
  (cache / 'streams').mkdir(parents=True, exist_ok=True)
  # The corpus is read in another process while this one spends its ten seconds importing TensorFlow.
  spawn = multiprocessing.get_context('spawn')
  readers = [spawn.Process(target=read, args=(s.spec(), cache)) for s in streams]
  for reader in readers:
    reader.start()
  import tasks.objectives  # noqa: F401

  for reader in readers:
    reader.join()
  for stream in streams:
    folder = cache / 'streams' / stream.key()
    with locked(folder.with_suffix('.lock'), log):
      writer = Ours(stream, folder, cache, log)
      writer.run()


def say(line: str):
  print(line, flush=True)


def read(spec: dict, cache: pathlib.Path):
  """Makes the store of a stream's corpus; an error is met again, and told, by `Ours.run`."""
  from tasks import store

  with contextlib.suppress(UserError), locked(cache / 'corpora.lock', say):
    store.open_store(from_spec(spec).corpus, cache, say)


@contextlib.contextmanager
def locked(path: pathlib.Path, log):
  """One writer at a time; the system releases the lock of a process that dies."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f'another process is writing {path.stem}: waiting for it')
      fcntl.flock(f, fcntl.LOCK_EX)
    yield


class Ours:
  """Freezes one stream of an objective over a corpus."""

  def __init__(self, stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log):
    self.stream, self.folder, self.cache, self.log = stream, folder, cache, log

  def run(self):
    if (self.folder / 'header.json').exists() and enough(self.folder, self.stream):
      return
    from tasks import store  # light; TensorFlow comes with the rest, below

    with locked(self.cache / 'corpora.lock', self.log):
      self.store = store.open_store(self.stream.corpus, self.cache, self.log)
    from tasks import objectives, vocabularies

    with locked(self.cache / 'vocabularies.lock', self.log):
      self.vocabulary = vocabularies.build(self.stream.vocabulary, self.cache, self.store, self.log)
    self.made = objectives.recipe(self.stream, self.vocabulary)
    self.folder.mkdir(exist_ok=True)
    if not (self.folder / 'header.json').exists():
      write_json(self.folder / 'header.json', self.header())
    self.start, self.tokens = time.monotonic(), 0
    for number in range(self.stream.passes):
      for piece in range(self.store.pieces(self.stream.split)):
        if not (self.folder / shard_name(number, piece)).with_suffix('.json').exists():
          self.shard(number, piece)
        if enough(self.folder, self.stream, number):
          break

  def header(self) -> dict:
    split = self.stream.split
    return {
      'stream': self.stream.spec() | {'examples': None},
      'pieces': self.store.pieces(split),
      'corpus': self.store.manifest['splits'][split]
      | {'name': self.stream.corpus.name, 'dropped': self.store.manifest['dropped']},
      'vocabulary': str(self.vocabulary),
      'vocab_size': int(self.vocabulary.vocab_size),
    }

  def shard(self, number: int, piece: int):
    """Writes the shard of pass `number` over `piece`."""
    from tasks import objectives, vocabularies

    documents = vocabularies.encode(self.vocabulary, self.store.documents(self.stream.split, piece))
    key = [self.stream.seed, number, piece, self.stream.split]
    seed = int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:4], 'big') >> 1
    sizes = vocabularies.token_bytes(self.vocabulary)
    with Shard(self.folder, number, piece, sizes) as shard:
      for rows in objectives.blocks(self.made, documents, self.stream.lengths, seed):
        self.tokens += shard.write(rows)
        self.progress(number, piece)
    self.progress(number, piece, end=True)

  def progress(self, number, piece, end=False):
    now = time.monotonic()
    if end or now - getattr(self, 'said', 0) > 2:
      self.said = now
      rate = self.tokens / max(now - self.start, 1e-9)
      self.log(
        f'freezing {self.stream.name} {self.stream.split}: {self.tokens / 1e6:.1f}M tokens, '
        f'{rate / 1e6:.2f}M tokens/s, piece {piece + 1} of {self.store.pieces(self.stream.split)}'
        + (f', pass {number + 1} of {self.stream.passes}' if self.stream.passes > 1 else '')
      )


def shard_name(number: int, piece: int) -> str:
  return f'pass{number}-{piece:05d}.bin'


def write_json(path: pathlib.Path, value):
  """Whole or not at all."""
  partial = path.with_name(path.name + '.partial')
  partial.write_text(json.dumps(value, indent=1))
  os.replace(partial, path)


def enough(folder: pathlib.Path, stream: Stream, number: int | None = None) -> bool:
  """Whether the shards of pass `number` (of all passes) hold what the stream asks for."""
  if number is None:
    return all(enough(folder, stream, p) for p in range(stream.passes))
  pieces = json.loads((folder / 'header.json').read_text())['pieces']
  found = 0
  for piece in range(pieces):
    path = (folder / shard_name(number, piece)).with_suffix('.json')
    if not path.exists():
      return False
    found += json.loads(path.read_text())['examples']
    if stream.examples is not None and found >= stream.examples:
      return True
  return True


def row_dtype(features: dict[str, int], vocab_size: int) -> np.dtype:
  """One example on disk: every feature's smallest unsigned integers, one after the other."""

  def small(key, length):
    if key.endswith('_tokens'):
      return np.uint16 if vocab_size <= 1 << 16 else np.uint32
    if key.endswith('_segment_ids') or key.endswith('_positions'):
      return np.uint16 if length <= 1 << 16 else np.uint32
    return np.uint8

  return np.dtype([(k, small(k, n), (n,)) for k, n in sorted(features.items())])


class Shard:
  """One shard as it is written: NAME.bin of rows, then NAME.json with its facts and hash."""

  def __init__(self, folder, number, piece, token_bytes):
    self.path = folder / shard_name(number, piece)
    self.partial = self.path.with_suffix('.partial')
    self.token_bytes, self.hash = token_bytes, hashlib.sha256()
    self.facts = {'examples': 0, 'target_tokens': 0, 'target_bytes': 0, 'positions': 0}
    self.dtype = None

  def __enter__(self):
    self.file = open(self.partial, 'wb')
    return self

  def write(self, rows) -> int:
    """Appends rows ({feature: (n, length)}); returns how many target tokens they hold."""
    if self.dtype is None:
      lengths = {k: v.shape[1] for k, v in rows.items()}
      self.dtype = row_dtype(lengths, len(self.token_bytes))
    n = len(next(iter(rows.values())))
    table = np.empty(n, self.dtype)
    for key, value in rows.items():
      if value.min(initial=0) < 0 or value.max(initial=0) > np.iinfo(self.dtype[key].base).max:
        raise UserError(f'{key} has a value outside {self.dtype[key].base}: {value.max()}.')
      table[key] = value
    side = 'encoder' if 'encoder_target_tokens' in rows else 'decoder'
    weights = rows[f'{side}_loss_weights']
    tokens = int(weights.sum())
    data = table.tobytes()
    self.file.write(data)
    self.hash.update(data)
    self.facts['examples'] += n
    self.facts['positions'] += weights.size
    self.facts['target_tokens'] += tokens
    sizes = self.token_bytes[rows[f'{side}_target_tokens']]
    self.facts['target_bytes'] += int((sizes * weights).sum())
    return tokens

  def __exit__(self, kind, *_):
    self.file.flush()
    os.fsync(self.file.fileno())
    self.file.close()
    if kind is not None:
      return
    os.replace(self.partial, self.path)
    features = [[k, self.dtype[k].base.name, self.dtype[k].shape[0]] for k in self.dtype.names]
    facts = self.facts | {'sha256': self.hash.hexdigest(), 'features': features}
    write_json(self.path.with_suffix('.json'), facts)


if __name__ == '__main__':
  main()
