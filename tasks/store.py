"""The text of a corpus, read once and kept: cleaned, without duplicates, shuffled, in pieces.

Every document goes to the piece that a hash of its content names and lies there in the hash's order.
So each piece is a uniform sample of the whole corpus, whatever the order of the files, and a run that
needs a tenth of the text reads a tenth of the pieces.
"""

import collections
import hashlib
import json
import pathlib
import shutil

import numpy as np

from research.streams import digest
from tasks import readers

# Bytes of text per piece. A piece is what one shard of a frozen stream is made from, and validation
# streams are short: theirs are small.
PIECE = {'train': 8 << 20, 'validation': 2 << 20}


class Store:
  """The kept text of one corpus.

  Attributes:
    manifest: documents, bytes, pieces and fingerprint by split; what was dropped and why.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = pathlib.Path(folder)
    self.manifest = json.loads((self.folder / 'manifest.json').read_text())

  def pieces(self, split: str) -> int:
    return self.manifest['splits'][split]['pieces']

  def fingerprint(self, split: str) -> str:
    return self.manifest['splits'][split]['fingerprint']

  def documents(self, split: str, piece: int) -> list[bytes]:
    """UTF-8 documents of one piece, in the store's order."""
    stem = self.folder / f'{split}-{piece:05d}'
    text = stem.with_suffix('.txt').read_bytes()
    ends = np.load(stem.with_suffix('.npy'))
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def open_store(corpus, cache: pathlib.Path, log=print) -> Store:
  """The store of `corpus` under `cache`, built when it is not there. Call it under the cache's lock."""
  folder = cache / 'corpora' / f'{corpus.name}-{_key(corpus)}'
  if not (folder / 'manifest.json').exists():
    partial = folder.with_name(folder.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _build(corpus, partial, log)
    partial.rename(folder)
  return Store(folder)


def _key(corpus) -> str:
  fields = {
    k: v if isinstance(v, str | int | float | None) else list(v) for k, v in vars(corpus).items()
  }
  return digest([PIECE, fields, corpus.signature()])


def _build(corpus, folder: pathlib.Path, log):
  dropped = collections.Counter()
  documents = {split: [] for split in PIECE}
  total = 0
  for split, _, text in readers.READERS[type(corpus)](corpus, dropped):
    documents[split].append((hashlib.blake2b(text, digest_size=16).digest(), text))
    total += len(text)
    if total >> 26 != (total - len(text)) >> 26:
      log(f'reading {corpus.name}: {total / 1e6:.0f} MB')
  documents = {split: dict(found) for split, found in documents.items()}
  for key in documents['validation'].keys() & documents['train'].keys():
    del documents['train'][key]
    dropped['in validation as well, taken out of train'] += 1
  splits = {split: _write(folder, split, found) for split, found in documents.items()}
  manifest = {'corpus': corpus.name, 'signature': corpus.signature(), 'splits': splits}
  manifest['dropped'] = dict(sorted(dropped.items()))
  (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1))
  for split, facts in splits.items():
    log(f'{corpus.name} {split}: {facts["documents"]} documents, {facts["bytes"] / 1e6:.1f} MB')


def _write(folder: pathlib.Path, split: str, documents: dict[bytes, bytes]) -> dict:
  size = sum(map(len, documents.values()))
  pieces = max(1, round(size / PIECE[split]))
  by_piece = [[] for _ in range(pieces)]
  for key in sorted(documents):
    by_piece[int.from_bytes(key[-8:], 'big') % pieces].append(documents[key])
  for i, texts in enumerate(by_piece):
    stem = folder / f'{split}-{i:05d}'
    stem.with_suffix('.txt').write_bytes(b''.join(texts))
    np.save(stem.with_suffix('.npy'), np.cumsum([len(t) for t in texts], dtype=np.int64))
  fingerprint = hashlib.sha256(b''.join(sorted(documents))).hexdigest()[:16]
  return {'documents': len(documents), 'bytes': size, 'pieces': pieces, 'fingerprint': fingerprint}
