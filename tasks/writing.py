"""What the writers of shards share."""

import hashlib
import json
import pathlib
import time

from research.data.streams import Stream


class Writer:
  """Base of the writers of the shards of a stream.

  Attributes:
    vocabulary: a seqio vocabulary.
    token_bytes: (vocab_size,) bytes of text of each id.
    pieces: shards of a pass, which any process may write in any order; None where one process has to write
      them one after the other.
  """

  pieces: int | None = None

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
