"""Files opened, cut into documents, and complained about: what the readers share."""

import collections
import contextlib
import gzip
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator

from research.core.errors import UserError, did_you_mean
from research.data import corpora

BLOCK = 1 << 20


def files(corpus: corpora.Files) -> Iterator[tuple[str | None, str]]:
  """(split, path) of a corpus's files; the split is None where a hash of each document decides."""
  rest = 'train' if corpus.validation_files else None
  for split, patterns in (('validation', corpus.validation_files), (rest, corpus.files)):
    for pattern in patterns:
      for path in remote(pattern) if '://' in pattern else corpora.found(pattern):
        yield split, path


def remote(pattern: str) -> list[str]:
  """Files that TensorFlow's file system finds, such as gs://bucket/*.jsonl.gz."""
  import tensorflow as tf

  try:
    paths = sorted(tf.io.gfile.glob(pattern))
  except tf.errors.OpError as e:
    raise UserError(f'cannot list {pattern}: {e.message.splitlines()[0]}') from e
  if not paths:
    raise UserError(f'no file matches {pattern}.')
  return paths


def binary(path: str):
  """A binary file object; .gz is decompressed."""
  if '://' not in path:
    return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')
  import tensorflow as tf

  raw = tf.io.gfile.GFile(path, 'rb')
  return gzip.GzipFile(fileobj=raw) if path.endswith('.gz') else raw


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
  """A path for a reader that opens local files only; what lies behind a URL is copied meanwhile."""
  if '://' not in path:
    yield path
    return
  import tensorflow as tf

  with tempfile.TemporaryDirectory() as folder:
    copy = f'{folder}/{path.rpartition("/")[2]}'
    tf.io.gfile.copy(path, copy)
    yield copy


def blocks_of(path: str) -> Iterator[bytes]:
  """The bytes of a file, at most a megabyte at a time."""
  with binary(path) as f:
    # Of a gzip file that ends in the middle, one read at a time gives all that is there.
    read = getattr(f, 'read1', f.read)
    first = read(BLOCK)
    if not first:
      raise EOFError('it is empty')
    yield first
    while block := read(BLOCK):
      yield block


def lines_of(path: str) -> Iterator[bytes]:
  """The lines of a file, without their ends."""
  held = []
  for block in blocks_of(path):
    first, *rest = block.split(b'\n')
    held.append(first)
    if rest:
      yield b''.join(held)
      *whole, last = rest
      yield from whole
      held = [last]
  if any(held):
    yield b''.join(held)


def cut(document: bytes, longest: int) -> list[bytes]:
  """A document in parts of at most `longest` bytes, cut after a line where there is one."""
  parts, at = [], 0
  while len(document) - at > longest:
    end = document.rfind(b'\n', at, at + longest) + 1
    if end <= at:
      end = at + longest
      while end > at + 1 and document[end] & 0xC0 == 0x80:  # not inside a character
        end -= 1
    parts.append(document[at:end])
    at = end
  return [*parts, document[at:]]


class Dropped(collections.Counter):
  """How much was left out of a corpus, by reason; `broken` has the first places where input was broken."""

  def __init__(self):
    super().__init__()
    self.broken: list[str] = []


class Broken:
  """Refuses or counts what is broken in one file, as the corpus says."""

  def __init__(self, corpus, dropped: Dropped, path: str):
    self.corpus, self.dropped, self.path = corpus, dropped, path
    self.line = 0  # the last that was read

  def __call__(self, what: str, kind: str):
    """`what` is wrong; `kind` is the name that it is counted under."""
    if self.corpus.broken == 'refuse':
      hint = f" (to go on without it: {type(self.corpus).__name__}.broken = 'skip')"
      raise UserError(f'{self.path}: {what}{hint}.')
    self.dropped[f'broken: {kind}'] += 1
    if len(self.dropped.broken) < 10:
      self.dropped.broken.append(f'{self.path}: {what}')

  def is_text(self, data: bytes, line: int) -> bool:
    """Whether `data`, which starts in `line`, is UTF-8."""
    try:
      data.decode()
    except UnicodeDecodeError as e:
      line += data[: e.start].count(b'\n')
      self(f'line {line} is not UTF-8 (byte 0x{data[e.start]:02x})', 'not UTF-8')
      return False
    return True

  @contextlib.contextmanager
  def reading(self, *errors):
    """Within this an unreadable rest of the file is refused or counted."""
    tensorflow = sys.modules.get('tensorflow')  # imported by now, where a URL is read
    known = (EOFError, OSError, zlib.error, *errors)
    known += (tensorflow.errors.OpError,) if tensorflow else ()
    try:
      yield
    except known as e:
      # TensorFlow's errors name its operation as well.
      why = getattr(e, 'strerror', None) or re.sub(r'{{.*?}}|\[Op:.*', '', str(e), flags=re.DOTALL)
      why = ' '.join(why.split())[:200].rstrip('.') or type(e).__name__
      if not isinstance(e, EOFError):
        why = f'it cannot be read ({why})'
      elif 'empty' not in why:
        why = 'it ends in the middle: a truncated gzip file'
      if self.line:
        why = f'after line {self.line} {why}'
      self(why, 'unreadable files')


def example(data: bytes, broken: Broken, number: int) -> dict:
  """The bytes features of a serialised tf.train.Example."""
  from google.protobuf.message import DecodeError
  from tensorflow.core.example import example_pb2

  try:
    features = example_pb2.Example.FromString(data).features.feature
  except DecodeError:
    broken(f'record {number} is not a tf.train.Example', 'not a tf.train.Example')
    return {}
  return {k: v.bytes_list.value[0] for k, v in features.items() if v.bytes_list.value}


def fields(corpus, broken: Broken, split, record: dict, where: str):
  """The (split, text) of one record, or its (split, prompt NUL completion)."""
  texts = []
  for name in filter(None, (corpus.prompt, corpus.field)):
    value = record.get(name)
    if isinstance(value, bytes):
      if not broken.is_text(value, 1):
        return
      value = value.decode()
    if not isinstance(value, str):
      kind = f' It is of type {type(value).__name__}.'
      hint = did_you_mean(name, record) if value is None else kind
      broken(f'{where} has no text field {name!r}.{hint}'.rstrip('.'), f'no text field {name!r}')
      return
    texts.append(value)
  if corpus.prompt:
    yield split, b'\0'.join(t.replace('\0', ' ').encode(errors='replace') for t in texts)
    return
  yield from ((split, part) for part in cut(texts[0].encode(errors='replace'), corpus.longest))
