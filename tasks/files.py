"""Opens files, cuts them into documents, and reports what is broken in them, for all readers."""

import bz2
import collections
import contextlib
import gzip
import json
import lzma
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator

from research.core.errors import UserError, did_you_mean, first_line
from research.core.storage import LFS_POINTER
from research.data import corpora

BLOCK = 1 << 20

# The first bytes of each compression, its usual suffix, and its name.
_COMPRESSIONS = (
  (re.compile(rb'\x1f\x8b'), '.gz', 'gzip'),
  (re.compile(rb'BZh[1-9](1AY&SY|\x17rE8P\x90)'), '.bz2', 'bzip2'),
  (re.compile(rb'\xfd7zXZ\0'), '.xz', 'xz'),
  (re.compile(rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'), '.zst', 'zstd'),
)
# Kinds of files that are refused, by their first bytes.
_OTHER_KINDS = (
  (b'PK\x03\x04', 'a zip archive: unpack it'),
  (b'7z\xbc\xaf\x27\x1c', 'a 7z archive: unpack it'),
  (b'\x04\x22\x4d\x18', 'compressed with lz4: unpack it'),
  (b'PAR1', 'a Parquet file: read it with corpora.Parquet'),
  (b'ARROW1', 'an Arrow file: read it with corpora.HuggingFace'),
  (LFS_POINTER, 'a Git LFS pointer and not the data: fetch it with git lfs pull'),
)


class Unreadable(Exception):
  """Why a file, or the rest of it, cannot be read: the end of a sentence that starts with 'FILE: '."""


def files(corpus: corpora.Files) -> Iterator[tuple[str | None, str]]:
  """(split, path) of the files of a corpus; the split is None where a hash of each document decides it."""
  other = 'train' if corpus.validation_files else None
  for split, patterns in (('validation', corpus.validation_files), (other, corpus.files)):
    for pattern in patterns:
      for path in remote(pattern) if '://' in pattern else corpora.matching(pattern):
        yield split, path


def remote(pattern: str) -> list[str]:
  """The files that a URL names for the file system of TensorFlow, such as gs://bucket/*.jsonl.gz."""
  import tensorflow as tf

  try:
    # A path that exists means that file, even with brackets in its name.
    paths = [pattern] if tf.io.gfile.exists(pattern) else sorted(tf.io.gfile.glob(pattern))
  except tf.errors.OpError as e:
    raise UserError(f'cannot list {pattern}: {first_line(e.message)}.') from e
  if not paths:
    raise UserError(f'no file matches {pattern}.')
  return paths


def _open_raw(path: str):
  if '://' not in path:
    return open(path, 'rb')
  import tensorflow as tf

  return tf.io.gfile.GFile(path, 'rb')


def compression(path: str) -> str | None:
  """'gzip', 'bzip2', 'xz', 'zstd' or None, by a file's first bytes.

  Raises:
    Unreadable: the kind of file is not supported, or the compression is not that of the suffix.
  """
  with _open_raw(path) as file:
    head = file.read(64)
  for magic, what in _OTHER_KINDS:
    if head.startswith(magic):
      raise Unreadable(f'it is {what}')
  for magic, suffix, name in _COMPRESSIONS:
    if magic.match(head):
      return name
    if head and path.endswith(suffix):
      raise Unreadable(f'it cannot be read (its name ends in {suffix}, and it is not {name})')
  return None


def binary(path: str):
  """A binary file object. It decompresses gzip, bzip2, xz and zstd, whatever the name of the file."""
  kind = compression(path)
  raw = _open_raw(path)
  if kind == 'gzip':
    return gzip.GzipFile(fileobj=raw)
  if kind == 'bzip2':
    return bz2.BZ2File(raw)
  if kind == 'xz':
    return lzma.LZMAFile(raw)
  if kind == 'zstd':
    import pyarrow

    return pyarrow.CompressedInputStream(raw, 'zstd')
  return raw


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
  """A local path, for a reader that opens no URLs: of a URL, a temporary copy."""
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
    # `read` of a truncated gzip file loses the text before its end; `read1` returns it.
    read = getattr(f, 'read1', f.read)
    first = read(BLOCK)
    if not first:
      raise EOFError('it is empty')
    yield first
    while block := read(BLOCK):
      yield block


def lines_of(path: str) -> Iterator[bytes]:
  """The lines of a file, without their ends."""
  partial = []  # the pieces of a line that spans blocks
  for block in blocks_of(path):
    first, *others = block.split(b'\n')
    partial.append(first)
    if others:
      yield b''.join(partial)
      *whole, last = others
      yield from whole
      partial = [last]
  if any(partial):
    yield b''.join(partial)


def cut(document: bytes, longest: int) -> list[bytes]:
  """A document cut into parts of at most `longest` bytes, at ends of lines where possible."""
  parts, start = [], 0
  while len(document) - start > longest:
    end = document.rfind(b'\n', start, start + longest) + 1
    if end <= start:
      end = start + longest
      while end > start + 1 and document[end] & 0xC0 == 0x80:  # not inside a character
        end -= 1
    parts.append(document[start:end])
    start = end
  return [*parts, document[start:]]


class Dropped(collections.Counter):
  """Counts of what was left out of a corpus, by reason; `broken` has the first places of broken input."""

  def __init__(self):
    super().__init__()
    self.broken: list[str] = []


class Broken:
  """Refuses or counts broken input in one file, as `Corpus.broken` says."""

  def __init__(self, corpus, dropped: Dropped, path: str):
    self.corpus = corpus
    self.dropped = dropped
    self.path = path
    self.line = 0  # the number of the last line that was read

  def __call__(self, what: str, kind: str):
    """Reports a fault. `what` describes it; faults are counted by `kind`."""
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

  def json(self, line: bytes, where: str) -> dict | None:
    """The JSON object of a line; None when it is broken."""
    try:
      record = json.loads(line)
    except json.JSONDecodeError as e:
      place = f'{e.msg.removesuffix(" at")} at column {e.colno}'
      self(f'{where} is not JSON ({place})', 'not JSON')
    except RecursionError:
      self(f'{where} is JSON that is nested too deeply to read', 'nested too deeply')
    except Exception as e:  # such as an integer of 5,000 digits, which Python refuses to convert
      self(f'{where} cannot be read as JSON ({_first_line(e)})', 'not JSON')
    else:
      if isinstance(record, dict):
        return record
      self(f'{where} is {json_type(record)} and not a JSON object', 'not a JSON object')
    return None

  @contextlib.contextmanager
  def reading(self, *errors):
    """A context that refuses or counts an unreadable rest of the file."""
    tensorflow = sys.modules.get('tensorflow')  # loaded only where a URL is read
    expected = (EOFError, OSError, zlib.error, lzma.LZMAError, Unreadable, *errors)
    expected += (tensorflow.errors.OpError,) if tensorflow else ()
    try:
      yield
    except UserError:
      raise
    except expected as e:
      why = self._why(e)
      self(f'after line {self.line} {why}' if self.line else why, 'unreadable files')

  def _why(self, error: Exception) -> str:
    if isinstance(error, Unreadable):
      return str(error)
    # Errors of TensorFlow also name its operation.
    text = getattr(error, 'strerror', None)
    text = text or re.sub(r'{{.*?}}|\[Op:.*', '', str(error), flags=re.DOTALL)
    text = ' '.join(text.split())[:200].rstrip('.') or type(error).__name__
    if 'it is empty' in text:
      return text
    if isinstance(error, EOFError) or 'Truncated compressed stream' in text:
      return f'it ends in the middle: a truncated {compression(self.path)} file'
    return f'it cannot be read ({text})'


def _first_line(error: Exception) -> str:
  # TensorFlow adds the system's own words behind a semicolon.
  return first_line(error).partition(';')[0].rstrip('.')


def json_type(value) -> str:
  """The JSON type of a value with its article: 'null', 'a string', 'an array'."""
  if value is None:
    return 'null'
  if isinstance(value, bool):
    return 'a boolean'
  names = {dict: 'an object', list: 'an array', str: 'a string', int: 'a number', float: 'a number'}
  return names.get(type(value), f'of type {type(value).__name__}')


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
      what = f'{where} has no text field {name!r}'
      if name not in record:
        what += f'.{did_you_mean(name, record)}'
      elif value is None:
        what += ': it is null'
      else:
        what += f'. It is of type {type(value).__name__}.'
      broken(what.rstrip('.'), f'no text field {name!r}')
      return
    texts.append(value)
  if corpus.prompt:
    yield split, b'\0'.join(t.replace('\0', ' ').encode(errors='replace') for t in texts)
    return
  yield from ((split, part) for part in cut(texts[0].encode(errors='replace'), corpus.longest))
