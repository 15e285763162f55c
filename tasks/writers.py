"""Writers of the shards of a stream: of an objective over a corpus, or of a registered seqio task."""

import pathlib

from research.core.errors import Invalid, UserError
from research.data import shards
from research.data.spec import digest
from research.data.streams import Stream
from tasks import registered
from tasks.files import Dropped
from tasks.writing import Writer


def writer(stream: Stream, folder: pathlib.Path, cache: pathlib.Path, log) -> Writer:
  """The writer of this stream."""
  if not stream.registered:
    kind = Ours
  elif stream.source_shards:
    kind = registered.BySource
  else:
    kind = registered.Registered
  return kind(stream, folder, cache, log)


class Ours(Writer):
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


def left_out(dropped: dict[str, int]) -> str:
  """{reason: count} in words."""
  return '; '.join(f'{n} {why}' for why, n in dropped.items())
