"""Builds the store of a corpus by many tasks on many hosts, with the bytes that `tasks.store.build` writes.

A task is a function of its arguments and of files in a folder that all hosts share, and writes its own files
whole or not at all. So a task that was lost is done again, one that was done is not, and the bytes depend
neither on the number of hosts nor on what fails. The tasks of a stage run at the same time, stage after stage:

  read     one file of the corpus: its documents, cleaned, with their keys, grouped by the key's first byte
  sort     the documents of one first byte in the order of keys, without exact duplicates; their signatures
  match    one band of MinHash: the documents that share it with another
  resolve  a single task: which of those nearly repeat one before them, in the order of the single process
  known    a single task: the n-grams of the validation documents
  overlap  the training documents of one first byte that have such an n-gram
  report   a single task: how much of validation is repeated
  write    one piece of a split

What a task holds in memory: `read` 64 MiB of text, twice; `sort` a 256th of the text, three times; `match` 32
bytes a document; `resolve` about 1 kB for each document that shares a band with another; `known`, `overlap` and
`report` 24 bytes for each n-gram of the validation split; `write` a piece, twice.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from research.core import storage
from research.core.text import si
from research.data import corpora
from research.data.spec import from_spec, to_spec
from tasks import buckets, cleaning, store
from tasks.files import Dropped, files

# Makes the calls {key: arguments} of the task with this name, on whatever hosts; returns {key: value}.
Run = Callable[[str, dict], dict]


def build(corpus, folder: pathlib.Path, run: Run, log=print) -> dict:
  """Writes the pieces of `corpus` under `folder`; returns the manifest of the store.

  Args:
    folder: on a disk that all hosts share; it may hold what an earlier call left.
    run: makes the calls of one stage.
    log: called with lines of progress.
  """
  work = folder / 'tasks'
  work.mkdir(parents=True, exist_ok=True)
  spec = to_spec(corpus)
  sources = sources_of(corpus)
  log(f'reading {corpus.name}: {len(sources)} files')
  facts = list(run('read', {i: (spec, i, *source) for i, source in enumerate(sources)}).values())
  totals = {split: sum(fact['bytes'][split] for fact in facts) for split in buckets.ORDER}
  log(f'sorting {corpus.name}: {si(sum(totals.values()), "B")}')
  facts += run('sort', {bucket: (spec, bucket) for bucket in range(buckets.BUCKETS)}).values()
  if rule := corpus.near_duplicates:
    bands = rule.permutations // rule.rows
    run('match', {band: (band,) for band in range(bands)})
    facts += run('resolve', {0: (spec,)}).values()
  overlap = None
  if corpus.contamination:
    run('known', {0: (spec,)})
    facts += run('overlap', {bucket: (spec, bucket) for bucket in range(buckets.BUCKETS)}).values()
    overlap = run('report', {0: (spec,)})[0]
  pieces = {split: store.piece_count(corpus, split, totals[split]) for split in buckets.ORDER}
  calls = [(split, piece) for split in buckets.ORDER for piece in range(pieces[split])]
  log(f'writing {corpus.name}: {len(calls)} pieces')
  written = run('write', {f'{s}-{p}': (str(folder), s, p, pieces[s]) for s, p in calls})
  splits = {}
  for split in buckets.ORDER:
    sizes = [written[f'{split}-{piece}'] for piece in range(pieces[split])]
    documents, size = (sum(size[i] for size in sizes) for i in (0, 1))
    splits[split] = store.split_facts(
      documents, size, pieces[split], buckets.fingerprint(work, split)
    )
    log(store.split_line(corpus, split, splits[split]))
  dropped = Dropped()
  for fact in facts:
    dropped.update(fact['dropped'])
    dropped.broken += fact.get('broken', [])
  del dropped.broken[10:]
  shutil.rmtree(work)
  return store.make_manifest(corpus, splits, dropped, overlap, log)


def do(name: str, work: str, key, *arguments):
  """Does one task, unless it was done before; returns its value, a JSON value.

  Args:
    name: of the stage.
    work: the folder that the tasks of a corpus share.
    key: differs between the calls of a stage.
  """
  done = pathlib.Path(work, f'{name}-{key}.json')
  if not done.exists():
    value = STAGES[name](pathlib.Path(work), *arguments)
    storage.write_atomic(done, json.dumps(value))
  return json.loads(done.read_text())


def sources_of(corpus) -> list[tuple[str | None, str | None]]:
  """(path, split) of each file of a corpus; [(None, None)] of one that is not a list of files."""
  if isinstance(corpus, corpora.Files):
    return [(path, split) for split, path in files(corpus)]
  return [(None, None)]


def read(work: pathlib.Path, spec: dict, number: int, path: str | None, split: str | None) -> dict:
  """Reads one source into segments: documents by split and first byte, with an index of where each begins."""
  corpus = from_spec(spec)
  if path is not None:
    # Where the split is known, the fraction says nothing, and it may be one that a corpus alone may not have.
    fraction = 0.5 if split else corpus.validation_fraction
    corpus = dataclasses.replace(
      corpus, files=(path,), validation_files=(), validation_fraction=fraction
    )
  dropped = Dropped()
  segment = buckets.Segment(work, number)
  sizes = dict.fromkeys(buckets.ORDER, 0)
  for named, key, text in store.keyed(corpus, dropped, split):
    segment.add(named, key, text)
    sizes[named] += len(text)
  segment.write()
  return {'dropped': dict(dropped), 'broken': dropped.broken, 'bytes': sizes}


def sort(work: pathlib.Path, spec: dict, bucket: int) -> dict:
  """Writes the documents of one first byte in order, for both splits, without exact duplicates."""
  corpus = from_spec(spec)
  dropped = Dropped()
  screen = store.Screen(
    dataclasses.replace(corpus, near_duplicates=None, contamination=None), dropped
  )
  near = cleaning.MinHash(corpus.near_duplicates) if corpus.near_duplicates else None
  for split in buckets.ORDER:
    spooled = sorted(buckets.spooled(work, split, bucket))
    kept = [(key, text) for key, text in spooled if screen.keeps(split, key, text)]
    stem = buckets.stem_of(work, split, bucket)
    keys = np.frombuffer(b''.join(key for key, _ in kept), np.uint8)
    storage.write_atomic(stem.with_suffix('.txt'), b''.join(text for _, text in kept))
    ends = np.cumsum([len(text) for _, text in kept], dtype=np.int64)
    buckets.save(stem.with_suffix('.ends.npy'), ends)
    buckets.save(stem.with_suffix('.keys.npy'), keys.reshape(-1, 16))
    if near:
      signatures = [near.signature(text) for _, text in kept]
      table = np.array(signatures, np.uint32).reshape(-1, near.rule.permutations)
      buckets.save(stem.with_suffix('.signatures.npy'), table)
      bands = [near.band_hashes(signature) for signature in signatures]
      table = np.array(bands, np.uint64).reshape(-1, len(near.bands))
      buckets.save(stem.with_suffix('.bands.npy'), table)
  return {'dropped': dict(dropped)}


def match(work: pathlib.Path, band: int) -> int:
  """Notes the documents that share a band with another: numbers in the order of screening."""
  hashes = [np.load(path, mmap_mode='r')[:, band] for path in buckets.files_of(work, '.bands.npy')]
  hashes = np.concatenate(hashes)
  order = np.argsort(hashes, kind='stable')
  equal = hashes[order][1:] == hashes[order][:-1]
  shared = np.zeros(len(hashes), bool)
  shared[order[1:][equal]] = True
  shared[order[:-1][equal]] = True
  buckets.save(work / f'shared-{band}.npy', np.flatnonzero(shared))
  return int(shared.sum())


def resolve(work: pathlib.Path, spec: dict) -> dict:
  """Notes the near-duplicates, in order: as the single process does, over those that share a band alone.

  A document that shares no band with another neither is a near-duplicate nor makes one.
  """
  near = cleaning.MinHash(from_spec(spec).near_duplicates)
  shared = [np.load(path) for path in sorted(work.glob('shared-*.npy'))]
  candidates = np.unique(np.concatenate(shared))
  repeated = []
  start = 0
  for path in buckets.files_of(work, '.signatures.npy'):
    signatures = np.load(path, mmap_mode='r')
    low, high = np.searchsorted(candidates, (start, start + len(signatures)))
    for number in candidates[low:high]:
      if near.has_seen(np.array(signatures[number - start])):
        repeated.append(number)
    start += len(signatures)
  buckets.save(work / 'near.npy', np.array(repeated, np.int64))
  return {'dropped': {'near duplicates': len(repeated)} if repeated else {}}


def known(work: pathlib.Path, spec: dict) -> int:
  """Writes the distinct n-grams of the validation documents that are left."""
  overlap = _validation(work, spec)
  overlap.close()
  buckets.save(work / 'known.npy', overlap.known)
  return len(overlap.known)


def _validation(work: pathlib.Path, spec: dict) -> cleaning.Overlap:
  overlap = cleaning.Overlap(from_spec(spec).contamination)
  for bucket in range(buckets.BUCKETS):
    for _, text in buckets.left(work, 'validation', bucket):
      overlap.add(text)
  return overlap


def overlap(work: pathlib.Path, spec: dict, bucket: int) -> dict:
  """Notes the n-grams of validation that a bucket of training repeats, and the documents to drop for it."""
  rule = from_spec(spec).contamination
  shared = cleaning.Overlap(rule)
  shared.known = np.load(work / 'known.npy')
  shared.hit = np.zeros(len(shared.known), bool)
  rows = [row for row, text in buckets.left(work, 'train', bucket) if shared.in_training(text)]
  buckets.save(work / f'hit-{bucket:03d}.npy', np.flatnonzero(shared.hit))
  buckets.save(work / f'overlap-{bucket:03d}.npy', np.array(rows if rule.drop else [], np.int64))
  count = len(rows) if rule.drop else 0
  return {'dropped': {'share an n-gram with validation': count} if count else {}}


def report(work: pathlib.Path, spec: dict) -> dict:
  """How much of the validation split training repeats, as `cleaning.Overlap.report` says it."""
  whole = _validation(work, spec)
  whole.close()
  for path in work.glob('hit-*.npy'):
    whole.hit[np.load(path)] = True
  return whole.report()


def write(work: pathlib.Path, folder: str, split: str, piece: int, pieces: int) -> tuple[int, int]:
  """Writes one piece of a split; returns its documents and its bytes."""
  # The first key, as a fraction of 2**64, of this piece and of the next.
  low, high = (-(-(p << 64) // pieces) for p in (piece, piece + 1))
  texts = []
  first_bucket, last_bucket = (key * buckets.BUCKETS >> 64 for key in (low, high - 1))
  for bucket in range(first_bucket, last_bucket + 1):
    first = buckets.first_eight(buckets.keys_of(work, split, bucket))
    start = np.searchsorted(first, np.uint64(low))
    end = len(first) if high >> 64 else np.searchsorted(first, np.uint64(high))
    texts += [text for _, text in buckets.left(work, split, bucket, int(start), int(end))]
  store.write_piece(pathlib.Path(folder), split, piece, texts)
  return len(texts), sum(map(len, texts))


STAGES = {
  function.__name__: function
  for function in (read, sort, match, resolve, known, overlap, report, write)
}
