"""Writers of the shards of a stream: of an objective over a corpus, or of a registered seqio task."""

import contextlib
import hashlib
import json
import pathlib
import re
import time

from research.core.errors import Invalid, UserError, did_you_mean
from research.data import shards
from research.data.spec import digest
from research.data.streams import Stream
from tasks.files import Dropped

# Examples per shard of a registered task, which has no pieces of text.
REGISTERED_SHARD = 16384


def writer(stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log):
  """The writer of this stream."""
  return (Registered if stream.registered else Ours)(stream, folder, cache, log)


class _Writer:
  """Base of the writers. `vocabulary` is a seqio vocabulary, `token_bytes` the bytes of text of each id."""

  def __init__(self, stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log):
    self.stream = stream
    self.folder = folder
    self.cache = cache
    self.log = log
    self.start = time.monotonic()
    self.last_logged = 0.0
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
    """The seed of one shard; it differs for every pass, piece and split."""
    key = json.dumps([self.stream.seed, number, piece, self.stream.split])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], 'big') >> 1

  def progress(self, shard: str, tokens: int, end=False):
    self.tokens += tokens
    now = time.monotonic()
    if end or now - self.last_logged > 2:
      self.last_logged = now
      rate = self.tokens / max(now - self.start, 1e-9)
      self.log(
        f'freezing {self.stream.name} {self.stream.split}: {self.tokens:,} tokens, '
        f'{rate:,.0f} tokens/s, {shard}'
      )


class Ours(_Writer):
  """Writes an objective over a corpus: a shard for every pass over every piece of the text."""

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
      description = self.stream.vocabulary
      self.vocabulary = vocabularies.build(description, self.cache, self.store, self.log)
    self.recipe = objectives.recipe(self.stream, self.vocabulary)
    _check_padding(self.stream, self.vocabulary)

  def header(self):
    facts = self.store.manifest['splits'][self.stream.split]
    corpus = {k: v for k, v in self.store.manifest.items() if k not in ('splits', 'signature')}
    return super().header() | {'corpus': corpus | facts}

  def shard(self, number: int, piece: int):
    """Writes the shard of pass `number` over `piece`."""
    from tasks import recipes, vocabularies

    pairs = self.stream.task.reads == 'pairs'
    # Every objective and length shares one tokenisation.
    tokens = self.cache / 'tokens' / digest([self.identity, self.store.folder.name])
    split = self.stream.split
    dropped = Dropped()
    if self.recipe.encode:
      documents, dropped = self.recipe.encode(self.store.documents(split, piece))
    else:
      documents = vocabularies.encoded(self.vocabulary, self.store, split, piece, tokens, pairs)
    if self.recipe.select:
      documents, dropped = self.recipe.select(documents)
    left_out_here = dict(sorted(dropped.items()))
    for place in dropped.broken:
      self.log(f'  {place}')
    name = f'piece {piece + 1} of {self.pieces}'
    if self.stream.passes > 1:
      name += f', pass {number + 1} of {self.stream.passes}'
    last = piece == self.pieces - 1
    seed = self.seed(number, piece)
    with shards.Shard(self.folder, number, piece, self.token_bytes, last) as shard:
      if left_out_here:
        shard.facts['left_out'] = left_out_here
      for rows in recipes.blocks(self.recipe, documents, self.stream.lengths, seed):
        self.progress(name, shard.write(rows))
    self.progress(name, 0, end=True)


def _check_padding(stream: Stream, vocabulary):
  """Raises `Invalid` where a model could not tell the end of an unpacked input from padding."""
  if vocabulary.eos_id == 0 and not stream.packing and 'inputs' in stream.lengths:
    why = (
      'False tells padding by its id 0, which ends documents in this vocabulary: set it to True.'
    )
    raise Invalid(Stream, 'packing', why)


class Registered(_Writer):
  """Writes a registered seqio Task or Mixture, with the feature converters of seqio."""

  def open(self):
    import importlib

    import seqio

    try:
      importlib.import_module(self.stream.module)
    except UserError:
      raise
    except Exception as e:  # a module from outside may raise anything
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
    # A new process repeats the iterator from its start: it is a function of the seed.
    return dataset.skip(piece * REGISTERED_SHARD).batch(256).as_numpy_iterator()

  @contextlib.contextmanager
  def _seqio(self, verb: str):
    """A context that turns any error of the task's code into a sentence."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:  # code from outside, run by seqio and TensorFlow, may raise anything
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
      self.upcoming = self._next()
    blocks_left = REGISTERED_SHARD // 256
    with shards.Shard(self.folder, number, piece, self.token_bytes, False) as shard:
      while self.upcoming is not None and blocks_left:
        with self._seqio('give the features that a model reads from'):
          tokens = shard.write(self.upcoming)
        self.progress(f'shard {piece + 1}', tokens)
        self.upcoming = self._next()
        blocks_left -= 1
      shard.last = self.upcoming is None
    self.next = piece + 1


def _sentence(error: Exception) -> str:
  """The message of an error of TensorFlow or of a generator, without stacks and graph nodes."""
  text = getattr(error, 'message', None) or str(error)
  raised = re.findall(r'^(?:\w+\.)*(\w+(?:Error|Exception)): (.+)$', text, re.MULTILINE)
  if raised and 'Traceback' in text:
    # TensorFlow prints the stack of an error of a generator; the message is in the last line.
    name, text = raised[-1]
    return f'{text.strip().rstrip(".")} ({name}).'
  text = re.sub(r'\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]', ' ', text, flags=re.DOTALL)
  text = ' '.join(text.split())[:300].rstrip('. ') or 'no reason given'
  return f'{text} ({type(error).__name__}).'


def left_out(dropped: dict[str, int]) -> str:
  """{reason: count} in words."""
  return '; '.join(f'{n} {why}' for why, n in dropped.items())
