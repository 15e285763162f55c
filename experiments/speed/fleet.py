"""Freezing on a Ray cluster of this machine: the same bytes as one process, with a host killed, and how fast.

    python experiments/speed/fleet.py --bytes=200000000 --hosts=3

Writes a corpus of JSON lines (words by Zipf's law) in which one document of 50 nearly repeats another file's.
Freezes it twice: by one process, and by the raylets of a cluster, of which one is killed and another joins.
Then it compares every file of the two caches byte by byte. Needs the extra `ray`.
"""

import argparse
import filecmp
import json
import pathlib
import sys
import tempfile
import threading
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research.data import cleaning, corpora, vocabularies  # noqa: E402
from research.data.streams import Stream  # noqa: E402

FILES = 12
WORDS = 2000  # of a document, on average
CHANGED = 0.01  # of the words of a near-duplicate


def write_corpus(folder: pathlib.Path, size: int) -> int:
  """Writes about `size` bytes of text; returns how many near-duplicates are among its documents."""
  random = np.random.default_rng(0)
  letters = random.integers(97, 123, (20_000, 8), np.uint8)
  words = np.array([row[: 3 + i % 6].tobytes().decode() for i, row in enumerate(letters)])
  odds = 1 / np.arange(10, len(words) + 10)
  odds /= odds.sum()
  files = [(folder / f'{i:02}.jsonl').open('w') for i in range(FILES)]
  written = planted = number = 0
  before: list[np.ndarray] = []
  while written < size:
    document = random.choice(words, random.integers(WORDS // 2, 3 * WORDS // 2), p=odds)
    if before and number % 50 == 0:
      document = before[random.integers(len(before))].copy()
      changed = random.random(len(document)) < CHANGED
      document[changed] = random.choice(words, changed.sum())
      planted += 1
    elif len(before) < 2000:
      before.append(document)
    text = ' '.join(document)
    files[number % FILES].write(json.dumps({'text': text}) + '\n')
    written += len(text)
    number += 1
  for file in files:
    file.close()
  return planted


def stream_of(folder: pathlib.Path) -> Stream:
  corpus = corpora.JsonLines(
    files=str(folder / '*.jsonl'),
    near_duplicates=cleaning.NearDuplicates(permutations=32),
    contamination=cleaning.Contamination(),
  )
  return Stream(corpus=corpus, vocabulary=vocabularies.Bytes(), lengths={'targets': 512})


def compare(one: pathlib.Path, other: pathlib.Path) -> int:
  """The number of files of both folders, whose bytes are equal; exits where they are not."""
  files = {p.relative_to(one) for p in one.rglob('*') if p.is_file() and p.suffix != '.lock'}
  others = {p.relative_to(other) for p in other.rglob('*') if p.is_file() and p.suffix != '.lock'}
  others = {path for path in others if not path.name.startswith('.shared')}
  if files != others:
    sys.exit(f'files of one alone: {sorted(map(str, files ^ others))[:5]}')
  same, different, errors = filecmp.cmpfiles(one, other, map(str, files), shallow=False)
  if different or errors:
    sys.exit(f'different: {different[:5]} {errors[:5]}')
  return len(same)


def on_cluster(stream: Stream, cache: pathlib.Path, cluster) -> tuple[float, list[str]]:
  """Freezes on raylets, one of which dies while it sorts documents; the seconds, and what was lost."""
  from tasks import freezing, on_ray

  lost: list[str] = []

  def log(line: str) -> None:
    print(f'  {line}', flush=True)
    lost.extend([line] if 'done again' in line else [])

  def kill() -> None:
    raylet = None
    while raylet is None:
      time.sleep(0.1)
      if list(cache.glob('corpora/*/tasks/sort-1*.json')):
        raylet = cluster.busy_with('do')
    print('  a host is killed, and another joins', flush=True)
    cluster.kill(raylet)
    cluster.add()

  engine = on_ray.Engine(cluster.address, cache, log)
  threading.Thread(target=kill, daemon=True).start()
  began = time.monotonic()
  freezing.freeze([stream], cache, log=log, engine=engine)
  return time.monotonic() - began, lost


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--bytes', type=int, default=200_000_000)
  parser.add_argument('--hosts', type=int, default=3)
  flags = parser.parse_args()
  from tests import raylets

  with tempfile.TemporaryDirectory() as folder, raylets.started(flags.hosts) as cluster:
    from tasks import freezing

    text, one, many = (pathlib.Path(folder, name) for name in ('text', 'one', 'many'))
    for path in (text, one, many):
      path.mkdir()
    planted = write_corpus(text, flags.bytes)
    stream = stream_of(text)
    began = time.monotonic()
    freezing.freeze([stream], one, log=lambda line: None)
    alone = time.monotonic() - began
    print(f'one process: {alone:.0f} s, {flags.bytes / alone / 1e6:.2f} MB/s', flush=True)
    together, lost = on_cluster(stream, many, cluster)
    print(
      f'{flags.hosts} hosts, one killed: {together:.0f} s, {flags.bytes / together / 1e6:.2f} MB/s'
    )
    print(
      f'{compare(one, many)} files, equal to the byte; {len(lost)} tasks were lost and done again'
    )
    (manifest,) = (json.loads(path.read_text()) for path in one.glob('corpora/*/manifest.json'))
    found = manifest['dropped'].get('near duplicates', 0)
    print(f'near-duplicates: {planted} planted, {found} found, by both')


if __name__ == '__main__':
  main()
