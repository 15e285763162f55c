"""Freezes a made-up corpus by one process and on three hosts of which one is killed, and compares every byte.

    python experiments/speed/freeze.py --megabytes=5
    python experiments/speed/freeze.py                  # 200 MB: several minutes, and 1.5 GB of disk

The corpus has documents that repeat one of another file, exactly or nearly. Both freezes are the command
`research.freeze`, with the byte vocabulary. The hosts are raylets of a processor each on this machine
(tests/raylets.py). One of them gets SIGKILL when half of the documents are sorted, with its tasks under way.

Prints, for both: seconds, MB of text a second, the memory of the largest process at its peak, and how many of
the repetitions were found. Exits with 1 unless all files are equal.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research.data import cleaning, corpora, vocabularies  # noqa: E402
from research.data.streams import Stream  # noqa: E402
from tests import raylets  # noqa: E402

WORDS = 20_000  # of the made-up language
MEAN_WORDS = 330  # of a document: about 2 kB
SHARES = {'exact': 0.01, 'near': 0.02}  # of the documents, that repeat another
CHANGED = (
  0.02  # of the words of a near-duplicate: a Jaccard similarity of about .83 of 5-word shingles
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--megabytes', type=float, default=200, help='of text')
  parser.add_argument('--files', type=int, default=12)
  parser.add_argument('--hosts', type=int, default=3)
  parser.add_argument('--folder', help='where to write; default: a temporary one')
  flags = parser.parse_args()
  with contextlib.ExitStack() as stack:
    temporary = flags.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix='freeze'))
    folder = pathlib.Path(temporary)
    planted = write_corpus(folder / 'text', flags.files, int(flags.megabytes * 1e6))
    stream = make_stream(folder / 'text')
    print(f'{flags.megabytes:g} MB in {flags.files} files; planted {planted}', flush=True)
    results = {'one process': frozen(stream, folder / 'one')}
    results[f'{flags.hosts} hosts, one killed'] = frozen_on(flags.hosts, stream, folder / 'many')
    return compare(results, folder, planted, flags.megabytes)


def make_stream(text: pathlib.Path) -> Stream:
  """A stream of byte tokens over the corpus of `write_corpus`."""
  corpus = corpora.JsonLines(
    files=str(text / '*.jsonl'),
    near_duplicates=cleaning.NearDuplicates(),
    contamination=cleaning.Contamination(),
    piece_bytes=2 << 20,
  )
  return Stream(corpus=corpus, vocabulary=vocabularies.Bytes(), lengths={'targets': 512})


def write_corpus(folder: pathlib.Path, files: int, size: int) -> dict[str, int]:
  """Writes JSON-lines files with `size` bytes of text in all; returns how many repetitions of each kind.

  A document that is repeated, and its repetition in another file, both begin with the same word of their own,
  such as near000012. The first repeats into the next file, the second into the one after it, and so on.
  """
  chance = np.random.default_rng(0)
  letters = np.array(list('abcdefghijklmnopqrstuvwxyz'))
  words = [''.join(chance.choice(letters, n)) for n in chance.integers(2, 10, WORDS)]
  folder.mkdir(parents=True)
  planted = dict.fromkeys(SHARES, 0)
  written = 0
  with contextlib.ExitStack() as stack:
    outs = [stack.enter_context(open(folder / f'{i:02d}.jsonl', 'w')) for i in range(files)]
    for number, text in enumerate(_texts(chance, words, planted)):
      if written >= size:
        return planted
      # The second of a pair, which _texts gives next to the first, goes to another file.
      first, *repeated = text
      for place, copy in enumerate([first, *repeated]):
        shift = place * (1 + number % max(1, files - 1))
        outs[(number + shift) % files].write(json.dumps({'text': copy}) + '\n')
        written += len(copy)
  raise AssertionError('_texts has no end')


def _texts(chance, words: list[str], planted: dict[str, int]) -> Iterator[list[str]]:
  """A document, or a document and its repetition."""
  while True:
    chosen = chance.integers(0, WORDS, chance.integers(MEAN_WORDS // 3, 2 * MEAN_WORDS))
    document = [words[i] for i in chosen]
    drawn = chance.random()
    if drawn > sum(SHARES.values()):
      yield [' '.join(document)]
      continue
    kind = 'exact' if drawn < SHARES['exact'] else 'near'
    document.insert(0, f'{kind}{planted[kind]:06d}')
    planted[kind] += 1
    copy = list(document)
    if kind == 'near':
      for place in chance.integers(1, len(copy), max(1, int(CHANGED * len(copy)))):
        copy[place] = 'other'
    yield [' '.join(document), ' '.join(copy)]


def frozen(stream: Stream, cache: pathlib.Path, *flags: str) -> dict:
  """Freezes by the command; returns its seconds and the MB of its largest process."""
  command = [sys.executable, '-m', 'research.freeze', f'--cache={cache}']
  command += [f'--spec={json.dumps([stream.spec()])}', *flags]
  began = time.perf_counter()
  log = cache.with_suffix('.log')
  with open(log, 'w') as out, Largest() as largest:
    status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode
  if status:
    raise SystemExit(f'the freeze failed:\n{log.read_text()[-3000:]}')
  return {'seconds': time.perf_counter() - began, 'megabytes': largest.bytes / 1e6}


def frozen_on(hosts: int, stream: Stream, cache: pathlib.Path) -> dict:
  """Freezes on a cluster of so many hosts, and kills the first of them when half is sorted."""
  with raylets.started(hosts) as cluster:
    killer = threading.Thread(target=kill_in_the_middle, args=(cluster, cache), daemon=True)
    killer.start()
    result = frozen(stream, cache, '--engine=ray', f'--address={cluster.address}')
    if len(cluster.raylets) == hosts:
      raise SystemExit('no host was killed: the freeze ended before')
  lost = cache.with_suffix('.log').read_text().count('is done again')
  print(f'tasks that were lost with the host and done again: {lost}', flush=True)
  return result


def kill_in_the_middle(cluster: raylets.Hosts, cache: pathlib.Path) -> None:
  """SIGKILL to a host as soon as half of the stage `sort` is done."""
  from tasks import buckets

  while len(list(cache.glob('corpora/*/tasks/sort-*.json'))) < buckets.BUCKETS // 2:
    time.sleep(0.02)
  cluster.kill(cluster.raylets[0])


class Largest:
  """The peak memory of the largest process that this one, or a child of it, started within the block.

  Attributes:
    bytes: of resident memory.
  """

  def __enter__(self):
    self.bytes = 0
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *error):
    self._over.set()
    self._thread.join()

  def _look(self):
    while not self._over.wait(0.2):
      for pid in raylets.descendants(os.getpid()):
        with contextlib.suppress(OSError, StopIteration):
          lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
          line = next(line for line in lines if line.startswith('VmHWM'))
          self.bytes = max(self.bytes, 1024 * int(line.split()[1]))


def compare(results: dict, folder: pathlib.Path, planted: dict, megabytes: float) -> int:
  """Prints the table; returns 0 if every file of both caches is equal."""
  one, many = files_in(folder / 'one'), files_in(folder / 'many')
  columns = ''.join(f'{kind + " found":>14}' for kind in planted)
  print(f'{"":24}{"seconds":>9}{"MB/s":>7}{"largest, MB":>13}{columns}')
  for (name, result), files in zip(results.items(), (one, many), strict=True):
    found = ''.join(f'{found_of(files, kind):>14}' for kind in planted)
    rate = megabytes / result['seconds']
    print(f'{name:24}{result["seconds"]:9.1f}{rate:7.2f}{result["megabytes"]:13,.0f}{found}')
  different = sorted(name for name in one.keys() | many.keys() if one.get(name) != many.get(name))
  size = sum(map(len, one.values())) / 1e6
  print(f'{len(one)} files, {size:,.0f} MB; different: {", ".join(different[:10]) or "none"}')
  return 1 if different else 0


def files_in(cache: pathlib.Path) -> dict[str, bytes]:
  """The files of a cache that a freeze is to give, by their path in it."""
  return {
    str(path.relative_to(cache)): path.read_bytes()
    for path in sorted(cache.rglob('*'))
    if path.is_file() and path.suffix != '.lock' and not path.name.startswith('.shared')
  }


def found_of(files: dict[str, bytes], kind: str) -> int:
  """How many documents of this kind of repetition are stored without their repetition."""
  text = b'\n'.join(data for name, data in files.items() if name.endswith('.txt'))
  counts: dict[bytes, int] = {}
  start = text.find(kind.encode())
  while start >= 0:
    name = text[start : start + len(kind) + 6]
    counts[name] = counts.get(name, 0) + 1
    start = text.find(kind.encode(), start + 1)
  return sum(count == 1 for count in counts.values())


if __name__ == '__main__':
  sys.exit(main())
