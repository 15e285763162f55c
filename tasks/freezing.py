"""FIXME: say what this module is."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import pathlib
import sys
import time

from research.core.errors import Invalid, UserError, did_you_mean
from research.data import shards
from research.data.spec import digest
from research.data.streams import Stream, from_spec

# Examples per shard of a registered task, which has no pieces of text.
REGISTERED_SHARD = 16384


def left_out(dropped: dict[str, int]) -> str:
  """Counts by reason, as a manifest has them, in words."""
  return '; '.join(f'{n} {why}' for why, n in dropped.items())


def say(line: str):
  print(line, flush=True)


def freeze(streams: list[Stream], cache: pathlib.Path, log=say, workers: int = 1):
  """Writes what is missing of every stream under `cache`.

  Args:
    streams: what to freeze.
    cache: the folder.
    log: called with lines of progress.
    workers: processes; the files are the same for any number.

  Raises:
    UserError: the corpus or the task is not as the stream says.
  """
  there = lambda s: shards.complete(cache / 'streams' / s.key(), s.passes, s.examples)
  missing = [s for s in streams if not there(s)]
  if missing and 'tensorflow' not in sys.modules:
    _import_and_read(missing, cache)
  for stream in missing:
    folder = cache / 'streams' / stream.key()
    with shards.locked(folder.with_suffix('.lock'), log):
      if not there(stream):
        _write(stream, folder, cache, log, workers)


def _import_and_read(streams, cache):
  """TensorFlow's ten seconds of import, while another process reads the corpora."""
  spawn = multiprocessing.get_context('spawn')
  specs = {json.dumps(s.spec()['corpus']): s.spec() for s in streams if not s.registered}
  readers = [spawn.Process(target=read, args=(spec, cache)) for spec in specs.values()]
  for reader in readers:
    reader.start()
  import tasks.objectives  # noqa: F401

  for reader in readers:
    reader.join()


def read(spec: dict, cache: pathlib.Path):
  """Makes the store of a stream's corpus; an error is met again, and told, by the writer."""
  from tasks import store

  with contextlib.suppress(UserError), shards.locked(cache / 'corpora.lock', say):
    store.open_store(from_spec(spec).corpus, cache, say)


def _write(stream, folder, cache, log, workers):
  started = writer(stream, folder, cache, log)
  folder.mkdir(exist_ok=True)
  if not (folder / 'header.json').exists():
    shards.write_json(folder / 'header.json', started.header())
  if workers > 1 and not stream.registered:
    return _write_with(workers, stream, started, cache, log)
  for number in range(stream.passes):
    while shards.facts_of(folder, number, stream.examples) is None:
      there = lambda p, n=number: (folder / shards.shard_name(n, p)).with_suffix('.json').exists()
      # The first that is missing: workers that were killed may have left a gap.
      started.shard(number, next(p for p in itertools.count() if not there(p)))


def _write_with(workers: int, stream, started, cache, log):
  """The same shards, `workers` at a time; up to `workers` - 1 more than are needed."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    workers, spawn, initializer=_start_worker, initargs=(stream.spec(), started.folder, cache)
  ) as pool:
    for number in range(stream.passes):
      while shards.facts_of(started.folder, number, stream.examples) is None:
        paths = (started.folder / shards.shard_name(number, p) for p in range(started.pieces))
        missing = [i for i, p in enumerate(paths) if not p.with_suffix('.json').exists()]
        list(pool.map(_work, [number] * workers, missing[:workers]))
        log(f'freezing {stream.name} {stream.split}: {workers} shards with {workers} workers')


def _start_worker(spec, folder, cache):
  global _worker
  _worker = writer(from_spec(spec), folder, cache, say)


def _work(number, piece):
  _worker.shard(number, piece)


def writer(stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log):
  """What writes the shards of this stream."""
  return (Registered if stream.registered else Ours)(stream, folder, cache, log)


class _Writer:
  """A stream being written; `vocabulary` is seqio's, `token_bytes` its bytes per id."""

  def __init__(self, stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log):
    self.stream, self.folder, self.cache, self.log = stream, folder, cache, log
    self.start, self.said, self.tokens = time.monotonic(), 0.0, 0
    self.open()
    from tasks import vocabularies

    self.token_bytes = vocabularies.token_bytes(self.vocabulary)
    self.identity = vocabularies.identity(self.vocabulary)

  def header(self) -> dict:
    return {
      'stream': self.stream.spec() | {'examples': None},
      'vocabulary': self.identity,
      'vocab_size': int(self.vocabulary.vocab_size),
      'corpus': None,
    }

  def seed(self, number: int, piece: int) -> int:
    """Of one shard: different for every pass, piece and split."""
    key = json.dumps([self.stream.seed, number, piece, self.stream.split])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], 'big') >> 1

  def progress(self, shard: str, tokens: int, end=False):
    self.tokens += tokens
    now = time.monotonic()
    if end or now - self.said > 2:
      self.said = now
      rate = self.tokens / max(now - self.start, 1e-9)
      self.log(
        f'freezing {self.stream.name} {self.stream.split}: {self.tokens:,} tokens, '
        f'{rate:,.0f} tokens/s, {shard}'
      )


class Ours(_Writer):
  """An objective over a corpus: one shard for every pass over every piece of the text."""

  def open(self):
    from tasks import store

    with shards.locked(self.cache / 'corpora.lock', self.log):
      self.store = store.open_store(self.stream.corpus, self.cache, self.log)
    self.pieces = self.store.pieces(self.stream.split)
    if not self.store.manifest['splits'][self.stream.split]['documents']:
      dropped = left_out(self.store.manifest['dropped'])
      why = f'{self.stream.corpus.name}: no document is left for the {self.stream.split} split'
      raise UserError(
        why + (f' (left out: {dropped}).' if dropped else ': the files have no text.')
      )
    from tasks import objectives, vocabularies

    with shards.locked(self.cache / 'vocabularies.lock', self.log):
      wanted = self.stream.vocabulary
      self.vocabulary = vocabularies.build(wanted, self.cache, self.store, self.log)
    self.made = objectives.recipe(self.stream, self.vocabulary)

  def header(self):
    facts = self.store.manifest['splits'][self.stream.split]
    corpus = {k: v for k, v in self.store.manifest.items() if k not in ('splits', 'signature')}
    return super().header() | {'corpus': corpus | facts}

  def shard(self, number: int, piece: int):
    """Writes the shard of pass `number` over `piece`."""
    from tasks import objectives, vocabularies

    pairs = self.stream.task.pairs
    # One tokenisation serves every objective and length.
    tokens = self.cache / 'tokens' / digest([self.identity, self.store.folder.name])
    split = self.stream.split
    documents = vocabularies.encoded(self.vocabulary, self.store, split, piece, tokens, pairs)
    name = f'piece {piece + 1} of {self.pieces}'
    if self.stream.passes > 1:
      name += f', pass {number + 1} of {self.stream.passes}'
    last = piece == self.pieces - 1
    seed = self.seed(number, piece)
    with shards.Shard(self.folder, number, piece, self.token_bytes, last) as shard:
      for rows in objectives.blocks(self.made, documents, self.stream.lengths, seed):
        self.progress(name, shard.write(rows))
    self.progress(name, 0, end=True)


class Registered(_Writer):
  """A seqio Task or Mixture of somebody else's, through seqio's own feature converters."""

  def open(self):
    import importlib

    import seqio

    importlib.import_module(self.stream.module)
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if self.stream.task not in names:
      hint = did_you_mean(self.stream.task, names)
      why = f'{self.stream.module} registers no seqio task or mixture {self.stream.task!r}.{hint}'
      raise Invalid(Stream, 'task', why)
    self.task = seqio.get_mixture_or_task(self.stream.task)
    if self.stream.split not in self.task.splits:
      hint = did_you_mean(self.stream.split, self.task.splits)
      why = f'{self.stream.task} has no split {self.stream.split!r}.{hint}'
      raise Invalid(Stream, 'split', why)
    self.vocabulary = self.task.output_features['targets'].vocabulary
    both = self.stream.architecture == 'encoder_decoder' or (
      self.stream.architecture is None and 'inputs' in self.stream.lengths
    )
    kind = seqio.EncDecFeatureConverter if both else seqio.DecoderFeatureConverter
    self.converter = kind(pack=self.stream.packing)
    self.number = None

  def rows(self, number: int, piece: int):
    """Model features in blocks of rows, from the first example of `piece` on."""
    import seqio

    seed = self.seed(number, 0)
    with seqio.map_seed_manager(seed):
      dataset = seqio.get_dataset(
        self.task,
        self.stream.lengths,
        self.converter,
        dataset_split=self.stream.split,
        shuffle=True,
        num_epochs=1,
        seed=seed,
        verbose=False,
      )
    # An iterator that was lost with its process is gone through again: it is a function of the seed.
    return dataset.skip(piece * REGISTERED_SHARD).batch(256).as_numpy_iterator()

  def shard(self, number: int, piece: int):
    """Writes the next shard; the iterator stays open for the one after it."""
    if self.number != number or self.next != piece:
      try:
        self.iterator = self.rows(number, piece)
      except ValueError as e:
        why = ' '.join(str(e).split())
        raise UserError(f'seqio cannot build {self.stream.task}: {why}') from e
      self.number, self.held = number, next(self.iterator, None)
    wanted = REGISTERED_SHARD // 256
    with shards.Shard(self.folder, number, piece, self.token_bytes, False) as shard:
      while self.held is not None and wanted:
        self.progress(f'shard {piece + 1}', shard.write(self.held))
        self.held, wanted = next(self.iterator, None), wanted - 1
      shard.last = self.held is None
    self.next = piece + 1
