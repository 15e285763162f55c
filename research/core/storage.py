"""Where a run or a sweep writes: a folder, or a bucket by its URL (gs://...).

Both are paths with pathlib's methods. An object of a bucket appears whole when its writing ends and cannot be
added to, and a folder is only the first part of names; what follows from that stands here.
"""

import contextlib
import io
import json
import os
import pathlib

from research.core import storage
from research.core.errors import UserError


def place(workdir):
  """The path of a --workdir: a `pathlib.Path`, or for a URL an `etils.epath.Path`, which Orbax takes too.

  Raises:
    UserError: the package that reads such URLs is not installed.
  """
  if not isinstance(workdir, str):
    return workdir
  if '://' not in workdir:
    return pathlib.Path(workdir)
  scheme = workdir.partition('://')[0]
  packages = {'gs': 'gcsfs', 's3': 's3fs'}
  if scheme not in packages:
    raise UserError(f'--workdir={workdir}: a URL of gs:// or s3:// is wanted, or a folder.')
  os.environ['EPATH_USE_TF'] = 'false'  # or a training process imports TensorFlow
  try:
    import fsspec
    from etils import epath
    from etils.epath import gpath

    gpath._is_tf_installed.cache_clear()  # it was asked before the line above
    # Listings are other processes' news: never yesterday's.
    fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    package = packages[scheme]
    raise UserError(
      f'--workdir={workdir} needs {package}: uv sync --extra tpu, or uv pip install {package}.'
    ) from None
  return epath.Path(workdir)


def is_bucket(path) -> bool:
  """Whether a path is of a bucket."""
  return not isinstance(path, pathlib.Path)


def make(workdir) -> None:
  """Makes a folder that can be written.

  Raises:
    UserError: it cannot; no such bucket, no rights.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_bucket(workdir):
      (workdir / '.writable').write_text('\n')  # only writing tells
    elif not os.access(workdir, os.W_OK):
      raise PermissionError(13, 'not writable')
  except OSError as error:
    raise _unwritable(workdir, error.strerror or _first_line(error)) from None
  except Exception as error:  # each store has errors of its own
    if not is_bucket(workdir):
      raise
    raise _unwritable(workdir, _first_line(error)) from None


def _first_line(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return 'no such bucket'
  return (str(error).strip().splitlines() or [''])[0].rstrip('.') or type(error).__name__


def _unwritable(workdir, why: str) -> UserError:
  return UserError(f'--workdir={workdir} cannot be written ({why}); choose another.')


def size(path) -> int:
  """Bytes of a file, -1 where there is none."""
  try:
    stat = path.stat()
  except FileNotFoundError:
    return -1
  return stat.length if is_bucket(path) else stat.st_size


def append(path, text: str) -> None:
  """Adds text to the end of a file."""
  with appending(path) as file:
    file.write(text)


@contextlib.contextmanager
def appending(path):
  """A text file open for adding to; in a bucket it gets there when it is closed."""
  if not is_bucket(path):
    with path.open('a') as file:
      yield file
    return
  file = io.StringIO()
  try:
    yield file
  finally:
    path.write_text((path.read_text() if path.exists() else '') + file.getvalue())


def write_atomic(path: pathlib.Path, text: str) -> None:
  """The file is either the old one or the whole new one, whatever dies."""
  if storage.is_bucket(path):
    path.write_text(text)
    return
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_text(text)
  temporary.replace(path)


def read_rows(path: pathlib.Path) -> list[dict]:
  """The rows of a JSON-lines file; a last line cut by a kill is left out."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows
