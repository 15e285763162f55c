"""Opens frozen streams: from the cache, from a bucket, or after a separate process has frozen them."""

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
from research.core.text import tell
from research.data.frozen import Frozen, FrozenMixture
from research.data.mixtures import Mixture, streams_of
from research.data.scored import Scored
from research.data.shards import complete
from research.data.spec import digest
from research.data.streams import Stream

HOME = '~/.cache/isoflop'
SETTING = 'ISOFLOP_CACHE'


def default_cache() -> pathlib.Path:
  """Returns the local data cache: $ISOFLOP_CACHE or ~/.cache/isoflop, or the local copy of a bucket."""
  return local_cache(os.environ.get('ISOFLOP_CACHE') or HOME)


def local_cache(place) -> pathlib.Path:
  """Returns the local folder of a cache, which is a folder or the URL of a bucket."""
  path = storage.place(place, SETTING)
  if storage.is_bucket(path):
    return storage.place(HOME, SETTING) / 'remote' / digest(str(place).rstrip('/'))
  return path


def open_stream(stream: Stream | Mixture, cache_dir=None, log=tell) -> Frozen | FrozenMixture:
  """Opens a stream or a mixture; freezes it first if it is missing."""
  return open_streams([stream], cache_dir, log)[0]


def open_streams(streams: list, cache_dir=None, log=tell) -> list[Frozen | FrozenMixture]:
  """Opens several streams or mixtures. One process freezes all that are missing.

  Args:
    streams: streams and mixtures.
    cache_dir: the folder of frozen streams; None is `default_cache()`. With a URL such as gs://bucket/data
      streams are copied to a local folder, and newly frozen streams are copied back.
    log: called with lines of progress.

  Raises:
    UserError: a stream cannot be frozen, or its files were altered. The message names it.
  """
  place = cache_dir or os.environ.get('ISOFLOP_CACHE') or HOME
  shared = storage.place(place, SETTING)
  cache = local_cache(place)
  folders = {}

  def folder(stream):
    key = json.dumps(stream.spec())
    if key not in folders:
      folders[key] = cache / 'streams' / stream.key()
    return folders[key]

  # Scores are frozen later, and not by the process that freezes text.
  parts = [part.unscored for stream in streams for part in streams_of(stream)]
  missing = [s for s in parts if not complete(folder(s), s.passes, s.examples)]
  if missing and storage.is_bucket(shared):
    for s in missing:
      _fetch(shared / 'streams' / s.key(), folder(s), log)
    missing = [s for s in missing if not complete(folder(s), s.passes, s.examples)]
  if missing:
    _freeze(missing, cache, log)
  if missing and storage.is_bucket(shared):
    for s in missing:
      _send(folder(s), shared / 'streams' / s.key(), log)

  def load(stream):
    if isinstance(stream, Mixture):
      return FrozenMixture(stream, {name: load(part) for name, part in stream.streams.items()})
    frozen = Frozen(folder(stream), stream.unscored)
    return Scored(frozen, stream.scores, cache, log) if stream.scores else frozen

  return [load(stream) for stream in streams]


def _rank(name: str) -> int:
  """Returns the order to copy a file in: JSON files complete a shard, and the header completes the stream."""
  if name == 'header.json':
    return 2
  return 1 if name.endswith('.json') else 0


def _fetch(source, target: pathlib.Path, log) -> None:
  """Copies those files of a stream from a bucket that the local folder lacks."""
  missing = storage.names(source) - storage.names(target)
  storage.copy_files(source, target, sorted(missing, key=_rank), log)


def _send(source: pathlib.Path, target, log) -> None:
  """Copies those files of a stream to a bucket that the bucket lacks."""
  files = {name for name in storage.names(source) if name.endswith(('.bin', '.json'))}
  missing = files - storage.names(target) - {'verified.json'}
  storage.copy_files(source, target, sorted(missing, key=_rank), log)


def child_environment() -> dict[str, str]:
  """Returns the environment of a child that imports TensorFlow; this process has the accelerator."""
  root = str(pathlib.Path(__file__).resolve().parent.parent.parent)
  # The child must find the user's modules, with an objective or a corpus, in the same folders.
  outside = [p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix))]
  paths = os.pathsep.join([root, os.getcwd(), os.environ.get('PYTHONPATH', ''), *outside])
  # The accelerator belongs to this process, which waits for the child.
  quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
  return os.environ | quiet | {'PYTHONPATH': paths.rstrip(os.pathsep)}


def _freeze(streams, cache: pathlib.Path, log):
  """Freezes streams in a separate process, so that this one never imports TensorFlow."""
  try:
    cache.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'cannot write the data cache {cache} ({e.strerror}): set ISOFLOP_CACHE.'
    ) from e
  spec = json.dumps([s.spec() for s in streams])
  command = [sys.executable, '-m', 'research.freeze', f'--spec={spec}', f'--cache={cache}']
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
  ) as child:
    errors = collections.deque(maxlen=40)
    # A thread reads stderr, or the child would block once the pipe is full.
    reader = threading.Thread(target=errors.extend, args=(child.stderr,))
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
  """Returns a sentence about a freezing process that failed without a message."""
  if code < 0:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else -code
    hint = ' (out of memory?)' if code == -signal.SIGKILL else ''
    return (
      f'signal {name} ended the freezing process{hint}: run again to continue from its last shard.'
    )
  last = errors[-1] if errors else f'exit status {code}'
  return f'the freezing process failed: {last}'
