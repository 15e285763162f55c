"""Freezing: what is missing of a stream is written, shard by shard, in a process that has TensorFlow.

A shard is a function of the stream, the pass and the piece of text, so it does not matter which process
writes it, or in which order, or how often one was killed.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import pathlib
import re
import sys
import time

from research.core.errors import Invalid, UserError, did_you_mean
from research.data import shards
from research.data.spec import digest, from_spec
from research.data.streams import Stream

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
  missing = [s for s in streams if not _is_complete(s, cache)]
  if missing and 'tensorflow' not in sys.modules:
    _import_and_read(missing, cache)
  for stream in missing:
    folder = cache / 'streams' / stream.key()
    with shards.locked(folder.with_suffix('.lock'), log):
      if not _is_complete(stream, cache):  # the process that held the lock may have written it
        _write(stream, folder, cache, log, workers)


def _is_complete(stream: Stream, cache: pathlib.Path) -> bool:
  return shards.complete(cache / 'streams' / stream.key(), stream.passes, stream.examples)


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
  new = writer(stream, folder, cache, log)
  folder.mkdir(exist_ok=True)
  if not (folder / 'header.json').exists():
    shards.write_json(folder / 'header.json', new.header())
  if workers > 1 and not stream.registered:
    _write_with(workers, stream, new, cache, log)
    return
  for number in range(stream.passes):
    while shards.facts_of(folder, number, stream.examples) is None:
      # The first that is missing: workers that were killed may have left a gap.
      new.shard(number, next(p for p in itertools.count() if not _is_written(folder, number, p)))


def _is_written(folder: pathlib.Path, number: int, piece: int) -> bool:
  return (folder / shards.shard_name(number, piece)).with_suffix('.json').exists()


def _write_with(workers: int, stream, new, cache, log):
  """The same shards, `workers` at a time; up to `workers` - 1 more than are needed."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    workers, spawn, initializer=_start_worker, initargs=(stream.spec(), new.folder, cache)
  ) as pool:
    for number in range(stream.passes):
      while shards.facts_of(new.folder, number, stream.examples) is None:
        missing = [p for p in range(new.pieces) if not _is_written(new.folder, number, p)]
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
    self.stream = stream
    self.folder = folder
    self.cache = cache
    self.log = log
    self.start = time.monotonic()
    self.said = 0.0  # when progress was last told
    self.tokens = 0
    self.open()
    from tasks import vocabularies

    description = None if stream.registered else stream.vocabulary
    self.token_bytes = vocabularies.token_bytes(self.vocabulary)
    self.identity = vocabularies.identity(self.vocabulary, description)

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
    self.recipe = objectives.recipe(self.stream, self.vocabulary)
    _check_padding(self.stream, self.vocabulary)

  def header(self):
    facts = self.store.manifest['splits'][self.stream.split]
    corpus = {k: v for k, v in self.store.manifest.items() if k not in ('splits', 'signature')}
    return super().header() | {'corpus': corpus | facts}

  def shard(self, number: int, piece: int):
    """Writes the shard of pass `number` over `piece`."""
    from tasks import objectives, vocabularies

    pairs = self.stream.task.reads == 'pairs'
    # One tokenisation serves every objective and length.
    tokens = self.cache / 'tokens' / digest([self.identity, self.store.folder.name])
    split = self.stream.split
    left_out_here = {}
    if self.recipe.encode:
      documents, dropped = self.recipe.encode(self.store.documents(split, piece))
      left_out_here = dict(sorted(dropped.items()))
      for place in dropped.broken:
        self.log(f'  {place}')
    else:
      documents = vocabularies.encoded(self.vocabulary, self.store, split, piece, tokens, pairs)
    name = f'piece {piece + 1} of {self.pieces}'
    if self.stream.passes > 1:
      name += f', pass {number + 1} of {self.stream.passes}'
    last = piece == self.pieces - 1
    seed = self.seed(number, piece)
    with shards.Shard(self.folder, number, piece, self.token_bytes, last) as shard:
      if left_out_here:
        shard.facts['left_out'] = left_out_here
      for rows in objectives.blocks(self.recipe, documents, self.stream.lengths, seed):
        self.progress(name, shard.write(rows))
    self.progress(name, 0, end=True)


def _check_padding(stream: Stream, vocabulary):
  """Raises `Invalid` where a model would take the end of an unpacked input for padding."""
  if vocabulary.eos_id == 0 and not stream.packing and 'inputs' in stream.lengths:
    why = (
      'False tells padding by its id 0, which ends documents in this vocabulary: set it to True.'
    )
    raise Invalid(Stream, 'packing', why)


class Registered(_Writer):
  """A seqio Task or Mixture of somebody else's, through seqio's own feature converters."""

  def open(self):
    import importlib

    import seqio

    try:
      importlib.import_module(self.stream.module)
    except UserError:
      raise
    except Exception as e:  # the module is somebody else's
      why = f'{self.stream.module!r} cannot be imported: {_sentence(e)}'
      raise Invalid(Stream, 'module', why) from e
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if self.stream.task not in names:
      hint = did_you_mean(self.stream.task, names)
      why = f'{self.stream.module} registers no seqio task or mixture {self.stream.task!r}.{hint}'
      raise Invalid(Stream, 'task', why)
    with self._seqio('build'):
      self.task = seqio.get_mixture_or_task(self.stream.task)
      splits = list(self.task.splits)
    if self.stream.split not in splits:
      hint = did_you_mean(self.stream.split, splits)
      why = f'{self.stream.task} has no split {self.stream.split!r}.{hint}'
      raise Invalid(Stream, 'split', why)
    if 'targets' not in self.task.output_features:
      why = f"{self.stream.task} has no output feature 'targets', which a model is to predict."
      raise Invalid(Stream, 'task', why)
    self.vocabulary = self.task.output_features['targets'].vocabulary
    if self.vocabulary.eos_id == 0:
      why = f'the vocabulary of {self.stream.task} ends documents with id 0, which seqio takes for padding: '
      raise Invalid(Stream, 'task', why + 'read its text with a corpus and an objective instead.')
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

  @contextlib.contextmanager
  def _seqio(self, verb: str):
    """Within this whatever the task's own code raises is told in a sentence."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:  # the task is somebody else's code, run by seqio and TensorFlow
      raise UserError(f'seqio cannot {verb} {self.stream.task}: {_sentence(e)}') from e

  def _next(self):
    with self._seqio(f'go on after {self.tokens:,} tokens of'):
      return next(self.iterator, None)

  def shard(self, number: int, piece: int):
    """Writes the next shard; the iterator stays open for the one after it."""
    if self.number != number or self.next != piece:
      with self._seqio('build'):
        self.iterator = self.rows(number, piece)
      self.number = number
      self.held = self._next()
    wanted = REGISTERED_SHARD // 256
    with shards.Shard(self.folder, number, piece, self.token_bytes, False) as shard:
      while self.held is not None and wanted:
        with self._seqio('give the features that a model reads from'):
          tokens = shard.write(self.held)
        self.progress(f'shard {piece + 1}', tokens)
        self.held = self._next()
        wanted -= 1
      shard.last = self.held is None
    self.next = piece + 1


def _sentence(error: Exception) -> str:
  """What an error of TensorFlow's or of somebody's generator says, without its stack and graph nodes."""
  text = getattr(error, 'message', None) or str(error)
  raised = re.findall(r'^(?:\w+\.)*(\w+(?:Error|Exception)): (.+)$', text, re.MULTILINE)
  if raised and 'Traceback' in text:
    # A generator's own error, printed by TensorFlow with the stack that led to it: its last line counts.
    name, text = raised[-1]
    return f'{text.strip().rstrip(".")} ({name}).'
  text = re.sub(r'\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]', ' ', text, flags=re.DOTALL)
  text = ' '.join(text.split())[:300].rstrip('. ') or 'no reason given'
  return f'{text} ({type(error).__name__}).'
