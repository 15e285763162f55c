"""Frozen streams read: memory-mapped rows -> batches, each a pure function of (seed, step).

No TensorFlow here: a stream that is not on disk yet is frozen by `python -m research.freeze`, started in
a process of its own.
"""

import collections
import hashlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading

import numpy as np

from research.errors import UserError
from research.shards import facts_of
from research.streams import Stream, digest

Batch = dict[str, np.ndarray]


def default_cache() -> pathlib.Path:
  """$ISOFLOP_CACHE, or ~/.cache/isoflop."""
  return pathlib.Path(os.environ.get('ISOFLOP_CACHE') or '~/.cache/isoflop').expanduser()


def open_stream(stream: Stream, cache_dir=None, log=print) -> 'Frozen':
  """The frozen form of `stream`, made first where it is missing."""
  return open_streams([stream], cache_dir, log)[0]


def open_streams(streams: list[Stream], cache_dir=None, log=print) -> 'list[Frozen]':
  """Frozen forms of several streams; what is missing is frozen in one process.

  Args:
    streams: what to open.
    cache_dir: where frozen streams lie; None is `default_cache()`.
    log: called with lines of progress.

  Raises:
    UserError: the stream cannot be made, or its files were altered; says which.
  """
  cache = pathlib.Path(cache_dir or default_cache()).expanduser()
  missing = [s for s in streams if not _present(cache / 'streams' / s.key(), s)]
  if missing:
    _freeze(missing, cache, log)
  return [Frozen(cache / 'streams' / s.key(), s) for s in streams]


def _present(folder: pathlib.Path, stream: Stream) -> bool:
  passes = range(stream.passes)
  return (folder / 'header.json').exists() and all(
    facts_of(folder, p, stream.examples) is not None for p in passes
  )


def _freeze(streams, cache: pathlib.Path, log):
  try:
    cache.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'cannot write the data cache {cache} ({e.strerror}): set ISOFLOP_CACHE.'
    ) from e
  spec = json.dumps([s.spec() for s in streams])
  command = [sys.executable, '-m', 'research.freeze', f'--spec={spec}', f'--cache={cache}']
  root = str(pathlib.Path(__file__).resolve().parent.parent)
  paths = os.pathsep.join([root, os.getcwd(), os.environ.get('PYTHONPATH', '')])
  # The accelerator belongs to the run that waits for this stream.
  quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
  env = os.environ | quiet | {'PYTHONPATH': paths.rstrip(os.pathsep)}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
  ) as child:
    errors = collections.deque(maxlen=40)
    reader = threading.Thread(target=lambda: errors.extend(child.stderr))
    reader.start()
    try:
      for line in child.stdout:
        log(line.rstrip())
    except BaseException:
      child.kill()
      raise
    reader.join()
  if child.returncode == 2 and errors:
    raise UserError(errors[-1].rstrip().removeprefix('error: '))
  if child.returncode:
    raise RuntimeError(f'research.freeze ended with {child.returncode}:\n{"".join(errors)}')


class Frozen:
  """A frozen stream: rows of fixed shape in memory-mapped shards.

  Attributes:
    manifest: what the stream is (spec, corpus, vocabulary), and its shards' counts and hashes.
    features: {key: (shape, dtype)} of one example as batches give it.
    vocab_size: ids in the vocabulary; every token is below it.
    bytes_per_token: true bytes of text per target token (a token with loss weight).
    fingerprint: differs when any example does.
    passes: how many corruptions of the corpus are frozen.
  """

  def __init__(self, folder: pathlib.Path, stream: Stream):
    self.folder, self.stream = folder, stream
    header = json.loads((folder / 'header.json').read_text())
    shards = [facts_of(folder, p, stream.examples) for p in range(stream.passes)]
    if None in shards:
      raise UserError(f'{folder} is not complete: delete it and run again.')
    self.manifest = header | {'shards': shards, 'examples': stream.examples}
    self.vocab_size, self.passes = header['vocab_size'], stream.passes
    facts = [s for some in shards for s in some]
    rows = next((f['features'] for f in facts if f['examples']), [])
    if not rows:
      raise UserError(f'{folder} holds no example: the {stream.split} split is too small.')
    self._dtype = np.dtype([(k, d, (n,)) for k, d, n in rows])
    self.features = {k: ((n,), np.dtype(np.int32)) for k, _, n in rows}
    self.bytes_per_token = _ratio(facts, 'target_bytes', 'target_tokens')
    self.fill = _ratio(facts, 'target_tokens', 'positions')
    self._check(facts)
    self._maps = [[self._map(s) for s in some] for some in shards]
    self._starts = [np.cumsum([0, *map(len, maps)]) for maps in self._maps]
    # Every pass has as many examples as the shortest: an epoch is the same length each time.
    self._examples = min(int(starts[-1]) for starts in self._starts)
    if stream.examples is not None:
      self._examples = min(self._examples, stream.examples)
    self.fingerprint = digest([[f['sha256'] for f in facts], self._examples])

  def _map(self, facts):
    if not facts['examples']:
      return np.empty(0, self._dtype)
    return np.memmap(self.folder / facts['file'], self._dtype, 'r')

  def _check(self, facts):
    """Sizes always, hashes once for every state of the files."""
    stamp = self.folder / 'verified.json'
    known = json.loads(stamp.read_text()) if stamp.exists() else {}
    fresh = {}
    for shard in facts:
      path = self.folder / shard['file']
      remedy = f'delete {self.folder} and run again.'
      if not path.exists():
        raise UserError(f'shard {path} has vanished: {remedy}')
      stat = path.stat()
      if stat.st_size != shard['examples'] * self._dtype.itemsize:
        raise UserError(f'shard {path} has {stat.st_size} bytes, not what was written: {remedy}')
      state = [stat.st_size, stat.st_mtime_ns, shard['sha256']]
      if known.get(shard['file']) != state:
        with open(path, 'rb') as f:
          if hashlib.file_digest(f, 'sha256').hexdigest() != shard['sha256']:
            raise UserError(f'shard {path} was altered since it was written: {remedy}')
        fresh[shard['file']] = state
    if fresh:
      partial = stamp.with_name(f'{stamp.name}.{os.getpid()}')
      try:
        partial.write_text(json.dumps(known | fresh))
        os.replace(partial, stamp)
      except OSError:
        pass  # a cache that only others may write is read all the same

  def __len__(self) -> int:
    """Examples per epoch."""
    return self._examples

  def examples(self, indices, number: int = 0) -> Batch:
    """Examples of pass `number`, stacked in the order of `indices`: {key: (n, length) int32}."""
    indices = np.asarray(indices)
    starts = self._starts[number]
    shard = np.searchsorted(starts, indices, side='right') - 1
    rows = np.empty(len(indices), self._dtype)
    for s in np.unique(shard):
      here = shard == s
      rows[here] = self._maps[number][s][indices[here] - starts[s]]
    return {k: rows[k].astype(np.int32) for k in self._dtype.names}


def _ratio(facts, above, below):
  return sum(f[above] for f in facts) / max(1, sum(f[below] for f in facts))


def permuted(indices: np.ndarray, n: int, key: int) -> np.ndarray:
  """Where a random permutation of range(n), named by `key`, sends `indices`; no table is kept.

  A four-round Feistel network on the smallest even number of bits that holds n, walked until it comes
  back below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
  """
  half = max(1, ((n - 1).bit_length() + 1) // 2)
  mask = np.uint64((1 << half) - 1)
  rounds = np.random.default_rng(key).integers(0, 1 << 63, 4, np.uint64) | np.uint64(1)

  def once(x):
    left, right = x >> np.uint64(half), x & mask
    for r in rounds:
      # splitmix64's finaliser as the round function
      z = (right + r) * np.uint64(0x9E3779B97F4A7C15)
      z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << np.uint64(half)) | right

  out = once(np.asarray(indices).astype(np.uint64))
  while (outside := out >= n).any():
    out[outside] = once(out[outside])
  return out.astype(np.int64)


def batch_at(frozen: Frozen, batch_size: int, seed: int, index: int, rows=slice(None)) -> Batch:
  """Batch `index` of the endless, per-epoch shuffled stream; `rows` picks a share of it."""
  n = len(frozen)
  at = np.arange(index * batch_size, (index + 1) * batch_size)[rows]
  epochs, offsets = at // n, at % n
  parts = []
  for epoch in np.unique(epochs):
    chosen = permuted(offsets[epochs == epoch], n, key=_epoch_key(seed, int(epoch)))
    parts.append(frozen.examples(chosen, int(epoch) % frozen.passes))
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _epoch_key(seed: int, epoch: int) -> int:
  return int(digest([seed, epoch]), 16)


def batches(
  frozen: Frozen,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
):
  """Batches without end, from batch `start` on; this process's rows of each.

  Batch i of the whole job is a function of (frozen, batch_size, seed, i) alone; process p gets its
  p-th contiguous share. So a job resumes anywhere, on any number of processes, from the one integer i.

  Args:
    frozen: the stream.
    batch_size: examples in the whole job's batch.
    seed: of the order of examples; every epoch has another order.
    start: index of the first batch.
    process_index: which share to give.
    process_count: into how many shares a batch is cut.
    prefetch: batches made ahead, in a thread; 0 makes each when asked.

  Yields:
    {key: (batch_size / process_count, length) int32}.
  """
  if batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} cannot be shared by {process_count} processes equally.'
    )
  share = batch_size // process_count
  rows = slice(process_index * share, (process_index + 1) * share)

  def made():
    i = start
    while True:
      yield batch_at(frozen, batch_size, seed, i, rows)
      i += 1

  return prefetched(made(), prefetch) if prefetch else made()


def eval_batches(frozen: Frozen, batch_size: int, process_index: int = 0, process_count: int = 1):
  """All examples once, in order; the last batch is filled up with rows of zero loss weight."""
  if batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} cannot be shared by {process_count} processes equally.'
    )
  share = batch_size // process_count
  n = len(frozen)
  for first in range(0, n, batch_size):
    at = first + process_index * share + np.arange(share)
    batch = frozen.examples(np.minimum(at, n - 1))
    for key in batch:
      if key.endswith('_loss_weights'):
        batch[key] = np.where(at[:, None] < n, batch[key], 0)
    yield batch


def prefetched(items, ahead: int):
  """The same items, made up to `ahead` of them early in a thread; an error comes where its item would."""
  made, stop = queue.Queue(ahead), threading.Event()

  def put(item):
    while not stop.is_set():
      try:
        return made.put(item, timeout=0.2)
      except queue.Full:
        continue

  def work():
    try:
      for item in items:
        put((item, None))
        if stop.is_set():
          return
      put((None, StopIteration()))
    except BaseException as e:
      put((None, e))

  threading.Thread(target=work, daemon=True).start()
  try:
    while True:
      item, error = made.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield item
  finally:
    stop.set()
