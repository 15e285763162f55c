"""Frozen streams in a bucket: fetched before they are read, sent after they are made.

Every kind of store that TensorStore opens by URL works (gs://, s3://, file://), without TensorFlow.
"""

import os
import pathlib

from research.core.errors import UserError


def is_remote(place) -> bool:
  """Whether a cache is a URL."""
  return '://' in str(place)


def _store(url: str):
  import tensorstore

  try:
    return tensorstore.KvStore.open(str(url).rstrip('/') + '/').result()
  except Exception as e:
    raise UserError(f'cannot open the data cache {url}: {_first_line(e)}') from e


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _rank(name: str) -> int:
  """A stream is there when its header is, and a shard when its facts are: those come last."""
  return 2 if name == 'header.json' else 1 if name.endswith('.json') else 0


def fetch(url: str, name: str, folder: pathlib.Path, log) -> None:
  """Copies the files of stream `name` that `folder` does not have.

  Raises:
    UserError: the store cannot be read.
  """
  store, prefix = _store(url), f'streams/{name}/'
  try:
    keys = [k.decode().removeprefix(prefix) for k in store.list(_under(prefix)).result()]
    missing = [k for k in sorted(keys, key=_rank) if k and not (folder / k).exists()]
    for key in missing:
      folder.mkdir(parents=True, exist_ok=True)
      log(f'fetching {url}/{prefix}{key}')
      partial = folder / f'{key}.{os.getpid()}'
      partial.write_bytes(store.read(prefix + key).result().value)
      os.replace(partial, folder / key)
  except (ValueError, OSError) as e:
    raise UserError(f'cannot read the data cache {url}: {_first_line(e)}') from e


def send(url: str, name: str, folder: pathlib.Path, log) -> None:
  """Copies the files of `folder` that the store does not have, each stream's header last.

  Raises:
    UserError: the store cannot be written.
  """
  store, prefix = _store(url), f'streams/{name}/'
  try:
    there = {k.decode().removeprefix(prefix) for k in store.list(_under(prefix)).result()}
    files = [p.name for p in folder.iterdir() if p.suffix in ('.bin', '.json')]
    for key in sorted(set(files) - there - {'verified.json'}, key=_rank):
      log(f'sending {url}/{prefix}{key}')
      store.write(prefix + key, (folder / key).read_bytes()).result()
  except (ValueError, OSError) as e:
    raise UserError(f'cannot write the data cache {url}: {_first_line(e)}') from e


def _under(prefix: str):
  import tensorstore

  start = prefix.encode()
  return tensorstore.KvStore.KeyRange(start, start[:-1] + bytes([start[-1] + 1]))
