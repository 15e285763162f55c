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


def open_store(corpus, cache: pathlib.Path, log=print) -> Store:
  """Opens the store of `corpus` under `cache`; builds it where it is missing. Hold the cache's lock."""
  key = digest([FORMAT, to_spec(corpus), corpus.signature()])
  folder = cache / 'corpora' / f'{corpus.name}-{key}'
  if not (folder / 'manifest.json').exists():
    partial = folder.with_name(folder.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = build(corpus, partial, log)
    (partial / 'manifest.json').write_text(json.dumps(manifest, indent=1))
    partial.rename(folder)
  return Store(folder)


def build(corpus, folder: pathlib.Path, log) -> dict:
  """Reads `corpus` into pieces under `folder`; returns the manifest."""
  dropped = Dropped()
  spools = {split: Spool(folder / f'{split}.spool') for split in SPLITS}
  total = 0
  last_logged = time.monotonic()
  for split, text in readers.read(corpus, dropped):
    if corpus.filters:
      text = cleaning.clean(text.decode(), corpus.filters, dropped)
      text = text and text.encode()
    if not text:
      continue
    # A conversation's file and line follow it. They are no part of the content that duplicates share.
    content = text.partition(b'\0')[0] if corpus.gives == 'conversations' else text
    key = hashlib.blake2b(content, digest_size=16).digest()
    if split is None:
      # From the half of the hash that does not decide the order, so that the two are independent.
      uniform = int.from_bytes(key[8:], 'big') / 2**64
      split = 'validation' if uniform < corpus.validation_fraction else 'train'
    spools[split].add(key, text)
    total += len(text)
    if time.monotonic() - last_logged > 2:
      last_logged = time.monotonic()
      log(f'reading {corpus.name}: {si(total, "B")}')
  screen = Screen(corpus, dropped)
  splits = {}
  for split in ('validation', 'train'):
    splits[split] = _write(folder, split, spools[split], screen, corpus)
    log(
      f'{corpus.name} {split}: {splits[split]["documents"]} documents, '
      f'{si(splits[split]["bytes"], "B")}'
    )
  for why, n in dropped.most_common():
    log(f'  left out: {n} {why}')
  for place in dropped.broken:
    log(f'  skipped: {place}')
  manifest = {'corpus': corpus.name, 'signature': corpus.signature(), 'splits': splits}
  manifest['dropped'] = dict(sorted(dropped.items()))
  manifest['broken'] = dropped.broken
  if screen.overlap:
    overlap = screen.overlap.report()
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
    self.last = None
    self.near = cleaning.MinHash(corpus.near_duplicates) if corpus.near_duplicates else None
    self.overlap = cleaning.Overlap(corpus.contamination) if corpus.contamination else None

  def keeps(self, split: str, key: bytes, text: bytes) -> bool:
    why = self._why_not(split, key, text)
    if why:
      self.dropped[why] += 1
    elif split == 'validation':
      self.keys.add(key)
    return not why

  def _why_not(self, split, key, text) -> str:
    last, self.last = self.last, key
    if key == last:  # equal documents are neighbours in the order
      return 'exact duplicates'
    if split == 'train' and key in self.keys:
      return 'exact duplicates of validation'
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
      data = path.read_bytes()
      documents = []
      start = 0
      while start < len(data):  # a key of 16 bytes, the length in 8, the text
        (length,) = struct.unpack_from('<Q', data, start + 16)
        text = start + 24
        documents.append((data[start : start + 16], data[text : text + length]))
        start = text + length
      yield from sorted(documents)
    shutil.rmtree(self.folder)


def _write(folder: pathlib.Path, split: str, spool: Spool, screen: Screen, corpus) -> dict:
  # A validation stream is short, and a stream reads whole pieces: smaller ones waste less.
  size = corpus.piece_bytes // (4 if split == 'validation' else 1)
  pieces = max(1, round(spool.total / size))
  documents = size = 0
  whole = hashlib.sha256()
  by_piece = []
  piece = 0

  def close():
    stem = folder / f'{split}-{piece:05d}'
    stem.with_suffix('.txt').write_bytes(b''.join(by_piece))
    np.save(stem.with_suffix('.npy'), np.cumsum([len(t) for t in by_piece], dtype=np.int64))

  for key, text in spool:
    if not screen.keeps(split, key, text):
      continue
    # The key, read as a fraction of 1, names the piece.
    while piece < int.from_bytes(key[:8], 'big') * pieces >> 64:
      close()
      by_piece = []
      piece += 1
    by_piece.append(text)
    documents += 1
    size += len(text)
    whole.update(key)
  while piece < pieces:
    close()
    by_piece = []
    piece += 1
  fingerprint = whole.hexdigest()[:16]
  return {'documents': documents, 'bytes': size, 'pieces': pieces, 'fingerprint': fingerprint}
