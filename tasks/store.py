"""The stored text of a corpus: read once, cleaned, without duplicates, shuffled, in pieces.

Documents are sorted by a hash of their content and then cut into pieces. So each piece is a uniform sample of
the whole corpus, whatever the order of the files, and a run that needs a tenth of the text reads a tenth of
the pieces.
"""

import hashlib
import json
import pathlib
import shutil
import struct
import time
from collections.abc import Iterator

import numpy as np

from research.core.text import si
from research.data.corpora import SPLITS
from research.data.spec import digest, to_spec
from research.data.streams import FORMAT
from tasks import cleaning, readers
from tasks.files import Dropped

# A spool sorts so many bytes of text in memory; more goes through files.
IN_MEMORY = 1 << 30


class Store:
  """The stored text of one corpus.

  Attributes:
    manifest: documents, bytes, pieces and fingerprint of each split; counts of dropped documents by reason.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = pathlib.Path(folder)
    self.manifest = json.loads((self.folder / 'manifest.json').read_text())

  def pieces(self, split: str) -> int:
    return self.manifest['splits'][split]['pieces']

  def fingerprint(self, split: str) -> str:
    return self.manifest['splits'][split]['fingerprint']

  def documents(self, split: str, piece: int) -> list[bytes]:
    """The UTF-8 documents of one piece, in stored order."""
    stem = self.folder / f'{split}-{piece:05d}'
    text = stem.with_suffix('.txt').read_bytes()
    ends = np.load(stem.with_suffix('.npy'))
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def open_store(corpus, cache: pathlib.Path, log=print, builder=None, resumes: str = '') -> Store:
  """Opens the store of `corpus` under `cache`; builds it where it is missing. Hold the cache's lock.

  Args:
    builder: builds it in place of `build`.
    resumes: the end of the name of the folder in which `builder` goes on with what it left; '' where it cannot.
  """
  key = digest([FORMAT, to_spec(corpus), corpus.signature()])
  folder = cache / 'corpora' / f'{corpus.name}-{key}'
  if not (folder / 'manifest.json').exists():
    partial = folder.with_name(folder.name + (resumes or '.partial'))
    if not resumes:
      shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    manifest = (builder or build)(corpus, partial, log)
    (partial / 'manifest.json').write_text(json.dumps(manifest, indent=1))
    partial.rename(folder)
  return Store(folder)


def build(corpus, folder: pathlib.Path, log) -> dict:
  """Reads `corpus` into pieces under `folder`; returns the manifest."""
  dropped = Dropped()
  spools = {split: Spool(folder / f'{split}.spool') for split in SPLITS}
  total = 0
  last_logged = time.monotonic()
  for split, key, text in keyed(corpus, dropped):
    spools[split].add(key, text)
    total += len(text)
    if time.monotonic() - last_logged > 2:
      last_logged = time.monotonic()
      log(f'reading {corpus.name}: {si(total, "B")}')
  screen = Screen(corpus, dropped)
  splits = {}
  for split in ('validation', 'train'):
    splits[split] = _write(folder, split, spools[split], screen, corpus)
    log(split_line(corpus, split, splits[split]))
  overlap = screen.overlap.report() if screen.overlap else None
  return make_manifest(corpus, splits, dropped, overlap, log)


def keyed(corpus, dropped: Dropped, split: str | None = None) -> Iterator[tuple[str, bytes, bytes]]:
  """(split, key, text) of every document that the filters keep; duplicates are among them.

  Args:
    dropped: counts what the filters drop.
    split: of all documents; None is what the reader or a hash says.
  """
  for named, text in readers.read(corpus, dropped):
    if corpus.filters:
      text = cleaning.clean(text.decode(), corpus.filters, dropped)
      text = text and text.encode()
    if not text:
      continue
    # A conversation's file and line follow it. They are no part of the content that duplicates share.
    content = text.partition(b'\0')[0] if corpus.gives == 'conversations' else text
    key = hashlib.blake2b(content, digest_size=16).digest()
    named = split or named
    if named is None:
      # From the half of the hash that does not decide the order, so that the two are independent.
      uniform = int.from_bytes(key[8:], 'big') / 2**64
      named = 'validation' if uniform < corpus.validation_fraction else 'train'
    yield named, key, text


def split_line(corpus, split: str, facts: dict) -> str:
  """A line about the size of a split."""
  return f'{corpus.name} {split}: {facts["documents"]} documents, {si(facts["bytes"], "B")}'


def split_facts(documents: int, size: int, pieces: int, fingerprint: str) -> dict:
  """What a manifest says of a split: documents, bytes of text, pieces, and a hash of its keys."""
  return {'documents': documents, 'bytes': size, 'pieces': pieces, 'fingerprint': fingerprint}


def make_manifest(corpus, splits: dict, dropped: Dropped, overlap: dict | None, log) -> dict:
  """The manifest of a store whose pieces are written, which it also logs.

  Args:
    splits: `split_facts` of each.
    overlap: the report of `cleaning.Overlap`, where contamination was looked for.
  """
  for why, n in dropped.most_common():
    log(f'  left out: {n} {why}')
  for place in dropped.broken:
    log(f'  skipped: {place}')
  manifest = {'corpus': corpus.name, 'signature': corpus.signature(), 'splits': splits}
  manifest['dropped'] = dict(sorted(dropped.items()))
  manifest['broken'] = dropped.broken
  if overlap:
    manifest['contamination'] = overlap
    log(
      f'contamination: {overlap["documents"]} of {overlap["of_documents"]} validation documents share '
      f'{corpus.contamination.ngram} words in a row with training'
    )
  return manifest


class Screen:
  """Finds duplicates within and between the splits. Screen the validation split first."""

  def __init__(self, corpus, dropped):
    self.dropped = dropped
    self.keys = set()  # of the validation split
    self.last = None  # the split and the key of the document before
    self.near = cleaning.MinHash(corpus.near_duplicates) if corpus.near_duplicates else None
    self.overlap = cleaning.Overlap(corpus.contamination) if corpus.contamination else None

  def keeps(self, split: str, key: bytes, text: bytes) -> bool:
    why = self._why_not(split, key, text)
    if why:
      self.dropped[why] += 1
    return not why

  def _why_not(self, split, key, text) -> str:
    last, self.last = self.last, (split, key)
    if last == (split, key):  # equal documents are neighbours in the order
      return 'exact duplicates'
    if split == 'train' and key in self.keys:
      return 'exact duplicates of validation'
    if split == 'validation':
      self.keys.add(key)
    if self.near and self.near.seen(text):
      return 'near duplicates'
    if self.overlap and split == 'validation':
      self.overlap.add(text)
    elif self.overlap and self.overlap.in_training(text) and self.overlap.rule.drop:
      return 'share an n-gram with validation'
    return ''


class Spool:
  """Documents with keys; iteration gives them sorted by key, without holding all of them in memory."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.in_memory = []
    self.size = 0  # bytes of text in memory
    self.total = 0

  def add(self, key: bytes, text: bytes):
    self.in_memory.append((key, text))
    self.size += len(text)
    self.total += len(text)
    if self.size > IN_MEMORY:
      self._flush()

  def _flush(self):
    self.folder.mkdir(exist_ok=True)
    # A file for every first byte of the keys, so that each is small enough to be sorted in memory.
    self.in_memory.sort(key=lambda item: item[0][0])
    files = {}
    for key, text in self.in_memory:
      if key[0] not in files:
        files[key[0]] = open(self.folder / f'{key[0]:03d}', 'ab')  # noqa: SIM115
      files[key[0]].write(key + struct.pack('<Q', len(text)) + text)
    for file in files.values():
      file.close()
    self.in_memory = []
    self.size = 0

  def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
    if not self.folder.exists():
      yield from sorted(self.in_memory)
      return
    self._flush()
    for path in sorted(self.folder.iterdir()):
      yield from sorted(records(path.read_bytes()))
    shutil.rmtree(self.folder)


def records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """(key, text) of spooled documents: a key of 16 bytes, the length of the text in 8, the text."""
  start = 0
  while start < len(data):
    (length,) = struct.unpack_from('<Q', data, start + 16)
    text = start + 24
    yield data[start : start + 16], data[text : text + length]
    start = text + length


def piece_count(corpus, split: str, total: int) -> int:
  """Into how many pieces a split of `total` bytes of text goes."""
  # A validation stream is short, and a stream reads whole pieces: smaller ones waste less.
  size = corpus.piece_bytes // (4 if split == 'validation' else 1)
  return max(1, round(total / size))


def write_piece(folder: pathlib.Path, split: str, piece: int, texts: list[bytes]) -> None:
  """Writes the two files of a piece: its text, and where each document ends."""
  stem = folder / f'{split}-{piece:05d}'
  stem.with_suffix('.txt').write_bytes(b''.join(texts))
  np.save(stem.with_suffix('.npy'), np.cumsum([len(text) for text in texts], dtype=np.int64))


def _write(folder: pathlib.Path, split: str, spool: Spool, screen: Screen, corpus) -> dict:
  pieces = piece_count(corpus, split, spool.total)
  documents = size = 0
  whole = hashlib.sha256()
  by_piece = []
  piece = 0

  for key, text in spool:
    if not screen.keeps(split, key, text):
      continue
    # The key, read as a fraction of 1, names the piece.
    while piece < int.from_bytes(key[:8], 'big') * pieces >> 64:
      write_piece(folder, split, piece, by_piece)
      by_piece = []
      piece += 1
    by_piece.append(text)
    documents += 1
    size += len(text)
    whole.update(key)
  while piece < pieces:
    write_piece(folder, split, piece, by_piece)
    by_piece = []
    piece += 1
  return split_facts(documents, size, pieces, whole.hexdigest()[:16])
