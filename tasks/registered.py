"""Writers of the shards of a registered seqio task, whole or by the shards of its source."""

import contextlib
import json
import pathlib
import re

from research.core.errors import Invalid, UserError, did_you_mean
from research.data import shards
from research.data.spec import digest
from research.data.streams import Stream
from tasks.writing import Writer

# Examples per shard of a task that is written whole: it has no pieces of text.
REGISTERED_SHARD = 16384


class Registered(Writer):
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

  def dataset(self, seed: int, shard_info=None):
    """Model features of the split, or of one shard of its source: a function of the seed."""
    import seqio

    with seqio.map_seed_manager(seed):
      return seqio.get_dataset(
        self.task,
        self.stream.lengths,
        self.converter,
        dataset_split=self.stream.split,
        shuffle=True,
        num_epochs=1,
        seed=seed,
        shard_info=shard_info,
        verbose=False,
      )

  def begin(self, number: int, piece: int):
    """Makes `upcoming` the first block of rows of `piece`."""
    with self._seqio('build'):
      # A new process repeats the dataset from its start.
      dataset = self.dataset(self.seed(number, 0)).skip(piece * REGISTERED_SHARD)
      self.iterator = dataset.batch(256).as_numpy_iterator()
    self.upcoming = self._next()

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

  def _write(self, shard: shards.Shard, name: str):
    """Writes the upcoming block of rows."""
    with self._seqio('give the features that a model reads from'):
      tokens = shard.write(self.upcoming)
    self.progress(name, tokens)
    self.upcoming = self._next()

  def shard(self, number: int, piece: int):
    """Writes the next shard; the iterator stays open for the one after it."""
    if self.number != number or self.next != piece:
      self.begin(number, piece)
      self.number = number
    blocks_left = REGISTERED_SHARD // 256
    with shards.Shard(self.folder, number, piece, self.token_bytes, False) as shard:
      while self.upcoming is not None and blocks_left:
        self._write(shard, f'shard {piece + 1}')
        blocks_left -= 1
      shard.last = self.upcoming is None
    self.next = piece + 1


class BySource(Registered):
  """Writes a registered seqio Task: a shard for every pass over every shard of its source, in their order.

  seqio shards a task before the preprocessors (`seqio.get_dataset` with a ShardInfo), so these, the shuffling
  and the packing see one shard of the source, and what one process writes does not depend on another's.
  """

  def open(self):
    super().open()
    import seqio

    if not isinstance(self.task, seqio.Task):
      why = f'{self.stream.task} is a mixture: mix streams of its tasks with mixtures.Mixture.'
      raise Invalid(Stream, 'source_shards', why)
    with self._seqio('list the shards of'):
      names = self.task.source.list_shards(self.stream.split)
    if not names:
      raise UserError(f'the source of {self.stream.task} {self.stream.split} has no shard.')
    self.pieces = len(names)
    # Without their folders, which may be others on another machine.
    self.source = digest([pathlib.PurePath(name).name for name in names])

  def header(self):
    return super().header() | {'source': {'shards': self.pieces, 'names': self.source}}

  def begin(self, number: int, piece: int):
    import seqio

    with self._seqio('build'):
      part = seqio.ShardInfo(index=piece, num_shards=self.pieces)
      dataset = self.dataset(self.seed(number, piece), part)
      self.iterator = dataset.batch(256).as_numpy_iterator()
    self.upcoming = self._next()

  def shard(self, number: int, piece: int):
    """Writes the shard of pass `number` over shard `piece` of the source."""
    source = json.loads((self.folder / 'header.json').read_text())['source']
    if source != self.header()['source']:
      raise UserError(
        f'the source of {self.stream.task} {self.stream.split} does not have the shards with which '
        f'{self.folder} was begun ({self.pieces}, then {source["shards"]}): give every host the same files, '
        'or delete the folder and run again.'
      )
    self.begin(number, piece)
    last = piece == self.pieces - 1
    with shards.Shard(self.folder, number, piece, self.token_bytes, last) as shard:
      while self.upcoming is not None:
        self._write(shard, f'shard {piece + 1} of {self.pieces}')


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
