"""Frozen streams by name: found in the cache, fetched from a bucket, or made by a process of their own."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

from research.core import storage
from research.core.errors import UserError
from research.data.frozen import Frozen, FrozenMixture
from research.data.mixtures import Mixture
from research.data.shards import complete
from research.data.spec import digest
from research.data.streams import Stream

HOME = '~/.cache/isoflop'
SETTING = 'ISOFLOP_CACHE'


def default_cache() -> pathlib.Path:
  """$ISOFLOP_CACHE, or ~/.cache/isoflop; of a URL the folder that it is copied to."""
  return local_cache(os.environ.get('ISOFLOP_CACHE') or HOME)


def local_cache(place) -> pathlib.Path:
  """The folder here for a cache that is a folder or a bucket's URL."""
  path = storage.place(place, SETTING)
  if storage.is_bucket(path):
    return storage.place(HOME, SETTING) / 'remote' / digest(str(place).rstrip('/'))
  return path


def open_stream(stream: Stream | Mixture, cache_dir=None, log=print) -> Frozen | FrozenMixture:
  """The frozen form of a stream or a mixture, made first where it is missing."""
  return open_streams([stream], cache_dir, log)[0]


def open_streams(streams: list, cache_dir=None, log=print) -> list[Frozen | FrozenMixture]:
  """Frozen forms of several streams or mixtures; all that is missing is frozen in one process.

  Args:
    streams: what to open.
    cache_dir: where frozen streams lie; None is `default_cache()`. From a URL such as gs://bucket/data
      they are fetched to a folder here; what is made here is sent there.
    log: called with lines of progress.

  Raises:
    UserError: the stream cannot be made, or its files were altered; says which.
  """
  place = cache_dir or os.environ.get('ISOFLOP_CACHE') or HOME
  shared, cache = storage.place(place, SETTING), local_cache(place)
  folders = {}

  def folder(stream):
    key = json.dumps(stream.spec())
    if key not in folders:
      folders[key] = cache / 'streams' / stream.key()
    return folders[key]

  flat = [p for s in streams for p in (s.streams.values() if isinstance(s, Mixture) else [s])]
  missing = [s for s in flat if not complete(folder(s), s.passes, s.examples)]
  if missing and storage.is_bucket(shared):
    for s in missing:
      _fetch(shared / 'streams' / s.key(), folder(s), log)
    missing = [s for s in missing if not complete(folder(s), s.passes, s.examples)]
  if missing:
    _freeze(missing, cache, log)
  if missing and storage.is_bucket(shared):
    for s in missing:
      _send(folder(s), shared / 'streams' / s.key(), log)
  load = lambda s: Frozen(folder(s), s)
  return [
    FrozenMixture(s, {name: load(part) for name, part in s.streams.items()})
    if isinstance(s, Mixture)
    else load(s)
    for s in streams
  ]


def _rank(name: str) -> int:
  """A stream is there when its header is, and a shard when its facts are: those are copied last."""
  return 2 if name == 'header.json' else 1 if name.endswith('.json') else 0


def _fetch(source, target: pathlib.Path, log) -> None:
  """Copies the files of a stream in a bucket that are not here yet."""
  missing = storage.names(source) - storage.names(target)
  storage.copy_files(source, target, sorted(missing, key=_rank), log)


def _send(source: pathlib.Path, target, log) -> None:
  """Copies the files of a stream that its bucket does not have."""
  files = {name for name in storage.names(source) if name.endswith(('.bin', '.json'))}
  missing = files - storage.names(target) - {'verified.json'}
  storage.copy_files(source, target, sorted(missing, key=_rank), log)


def _freeze(streams, cache: pathlib.Path, log):
  try:
    cache.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'cannot write the data cache {cache} ({e.strerror}): set ISOFLOP_CACHE.'
    ) from e
  spec = json.dumps([s.spec() for s in streams])
  command = [sys.executable, '-m', 'research.freeze', f'--spec={spec}', f'--cache={cache}']
  root = str(pathlib.Path(__file__).resolve().parent.parent.parent)
  # Modules of the user's, with an objective or a corpus, are found where this process found them.
  own = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
  paths = os.pathsep.join([root, os.getcwd(), os.environ.get('PYTHONPATH', ''), *own])
  # The accelerator belongs to the run that waits for this stream.
  quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
  env = os.environ | quiet | {'PYTHONPATH': paths.rstrip(os.pathsep)}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
  ) as child:
    errors = collections.deque(maxlen=40)
    reader = threading.Thread(target=lambda: errors.extend(child.stderr))
    reader.start()
    try:
      for line in child.stdout:
        log(line.rstrip())
    except BaseException:
      child.kill()
      raise
    reader.join()
  if child.returncode == 2 and errors:
    raise UserError(errors[-1].rstrip().removeprefix('error: '))
  if child.returncode:
    raise UserError(_ended(child.returncode, [line.strip() for line in errors if line.strip()]))


def _ended(code: int, errors: list[str]) -> str:
  """A sentence about a freezing process that ended otherwise than with a sentence of its own."""
  if code < 0:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else -code
    hint = ' (out of memory?)' if code == -signal.SIGKILL else ''
    return f'the process that freezes was ended by signal {name}{hint}: run again, it goes on from there.'
  last = errors[-1] if errors else f'it ended with {code}'
  return f'the process that freezes failed: {last}'
