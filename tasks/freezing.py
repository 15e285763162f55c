"""Freezes streams: writes their missing shards, in a process that imports TensorFlow.

A shard is a function of the stream, the pass and the piece of text. So any process may write it, in any order,
and a killed process loses only the shard in hand.
"""

import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import pathlib
import sys

from research.core.errors import UserError
from research.data import shards
from research.data.spec import from_spec
from research.data.streams import Stream
from tasks.writers import writer


def say(line: str):
  print(line, flush=True)


def freeze(streams: list[Stream], cache: pathlib.Path, log=say, workers: int = 1, engine=None):
  """Writes the missing shards of every stream under `cache`.

  Args:
    streams: what to freeze.
    cache: the folder.
    log: called with lines of progress.
    workers: processes; the files are the same for any number.
    engine: hosts of a cluster, in place of these processes; the files are the same for any of them.

  Raises:
    UserError: the corpus or the task is not as the stream says.
  """
  missing = [s for s in streams if not _is_complete(s, cache)]
  if missing and engine is None and 'tensorflow' not in sys.modules:
    _import_and_read(missing, cache)
  for stream in missing:
    folder = cache / 'streams' / stream.key()
    with shards.locked(folder.with_suffix('.lock'), log):
      if not _is_complete(stream, cache):  # another process may have written it meanwhile
        _write(stream, folder, cache, log, workers, engine)


def _is_complete(stream: Stream, cache: pathlib.Path) -> bool:
  return shards.complete(cache / 'streams' / stream.key(), stream.passes, stream.examples)


def _import_and_read(streams, cache):
  """Imports TensorFlow, which takes ten seconds, while other processes read the corpora."""
  spawn = multiprocessing.get_context('spawn')
  specs = {json.dumps(s.spec()['corpus']): s.spec() for s in streams if not s.registered}
  readers = [spawn.Process(target=read, args=(spec, cache)) for spec in specs.values()]
  for reader in readers:
    reader.start()
  import tasks.objectives  # noqa: F401

  for reader in readers:
    reader.join()


def read(spec: dict, cache: pathlib.Path):
  """Builds the store of a stream's corpus. It ignores errors, which the writer meets again and reports."""
  from tasks import store

  with contextlib.suppress(UserError), shards.locked(cache / 'corpora.lock', say):
    store.open_store(from_spec(spec).corpus, cache, say)


def _write(stream, folder, cache, log, workers, engine=None):
  if engine and not stream.registered:
    with shards.locked(cache / 'corpora.lock', log):
      engine.open_store(stream.corpus)
  new = writer(stream, folder, cache, log)
  folder.mkdir(exist_ok=True)
  if not (folder / 'header.json').exists():
    shards.write_json(folder / 'header.json', new.header())
  if engine and new.pieces is None:
    log(
      f'{stream.name} is a registered task, which one process freezes: seqio cannot begin in its middle. '
      'Stream.source_shards has it read in parts'
    )
  elif engine:
    engine.write(stream, new)
    return
  if workers > 1 and new.pieces is not None and (pool := _pool(workers, stream, new, cache, log)):
    with pool:
      _write_with(pool, workers, stream, new, log)
    return
  for number in range(stream.passes):
    while shards.facts_of(folder, number, stream.examples) is None:
      # The first missing piece, because killed workers may have left a gap.
      new.shard(
        number, next(p for p in itertools.count() if not shards.is_written(folder, number, p))
      )


def _pool(workers: int, stream, new, cache, log):
  """Processes that write shards; None, and a line, where the machine cannot have them wait for each other."""
  spawn = multiprocessing.get_context('spawn')
  try:
    return concurrent.futures.ProcessPoolExecutor(
      workers, spawn, initializer=_start_worker, initargs=(stream.spec(), new.folder, cache)
    )
  except OSError as error:  # semaphores are files of /dev/shm
    log(
      f'one worker in place of {workers}: no semaphore can be made in /dev/shm ({error.strerror})'
    )
    return None


def _write_with(pool, workers: int, stream, new, log):
  """The same shards, `workers` at a time; up to `workers` - 1 more than are needed."""
  for number in range(stream.passes):
    while shards.facts_of(new.folder, number, stream.examples) is None:
      missing = [p for p in range(new.pieces) if not shards.is_written(new.folder, number, p)]
      list(pool.map(_work, [number] * workers, missing[:workers]))
      log(f'freezing {stream.name} {stream.split}: {workers} shards with {workers} workers')


def _start_worker(spec, folder, cache):
  global _worker
  _worker = writer(from_spec(spec), folder, cache, say)


def _work(number, piece):
  _worker.shard(number, piece)
