"""Files in a local folder or in a bucket (gs://..., s3://...): the only module that tells them apart.

`place` makes paths with the methods of pathlib for both. An object of a bucket appears when its write ends and
cannot be appended to, and a folder of a bucket is only a prefix of names.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable

from research.core.errors import UserError, first_line

# The package through which each kind of bucket is read.
PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}
# The first bytes of a pointer file of Git LFS.
LFS_POINTER = b'version https://git-lfs.github.com/spec/'
# Characters with a meaning in globs or URLs; and `name:`, which looks like the start of a URL.
_SPECIAL = re.compile(r'[\[\]*?#%|\\\ud800-\udfff]|:(?=/|$)')


def place(name, setting: str = '--workdir'):
  """Returns the path that a flag or a variable names.

  Args:
    name: a folder (`~` is the home folder) or a URL; a path that this function made is returned unchanged.
    setting: the flag or the variable, for messages.

  Returns:
    A `pathlib.Path`, or for a bucket an `etils.epath.Path`, which Orbax takes too.

  Raises:
    UserError: the name is not a path, the kind of bucket is unknown, or its package is not installed.
  """
  if not isinstance(name, str):
    return _expanded(name, setting) if isinstance(name, pathlib.Path) else name
  scheme, separator, location = name.partition('://')
  if not name.strip() or '\0' in name:
    raise UserError(f'{setting}={name!r} names no folder.')
  if scheme == 'file' and separator:
    return _expanded(pathlib.Path(location), setting)
  if not separator:
    if name.startswith(tuple(f'{kind}:' for kind in PACKAGES)):
      raise UserError(
        f'{setting}={name}: the URL of a bucket starts with {name.partition(":")[0]}://.'
      )
    return _expanded(pathlib.Path(name), setting)
  if scheme not in PACKAGES:
    raise UserError(f'{setting}={name}: a URL of gs:// or s3:// is wanted, or a folder.')
  if special := _SPECIAL.search(location):
    raise UserError(
      f'{setting}={name}: a folder of a bucket cannot have {special[0]!r} in its name.'
    )
  return _bucket(name, scheme, setting)


def _expanded(path: pathlib.Path, setting: str) -> pathlib.Path:
  try:
    return path.expanduser()
  except RuntimeError:
    raise UserError(
      f'{setting}={path}: there is no such user, or this user has no home folder; name it without ~.'
    ) from None


def _bucket(url: str, scheme: str, setting: str):
  os.environ['EPATH_USE_TF'] = 'false'  # otherwise etils imports TensorFlow into a training process
  try:
    import fsspec
    from etils import epath
    from etils.epath import gpath

    gpath._is_tf_installed.cache_clear()  # it may have cached an answer before EPATH_USE_TF was set
    # Other processes write to the bucket too, so a listing must not come from a cache.
    fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    package = PACKAGES[scheme]
    raise UserError(
      f'{setting}={url} needs {package}: uv sync --extra tpu, or uv pip install {package}.'
    ) from None
  return epath.Path(url)


def is_bucket(path) -> bool:
  """Returns whether a path is in a bucket."""
  return not isinstance(path, pathlib.Path)


def plain_path(folder):
  """Returns a path to the same folder without characters that are special in globs and URLs.

  Orbax and TensorStore make globs and URLs from paths, and do not find files under 'runs[1]' or 'a#b'. For such
  a path this makes the folder, and a link to it that has the same name in every process.

  Raises:
    UserError: the link cannot be made.
  """
  if is_bucket(folder) or not _SPECIAL.search(str(folder.absolute())):
    return folder
  target = os.fsencode(folder.absolute())
  links = pathlib.Path(tempfile.gettempdir()) / f'isoflop-{os.getuid()}'
  link = links / hashlib.sha256(target).hexdigest()[:16]
  try:
    # First the folder: a link to a folder that does not exist cannot be used.
    folder.mkdir(parents=True, exist_ok=True)
    links.mkdir(mode=0o700, exist_ok=True)
    if links.stat().st_uid != os.getuid() or _SPECIAL.search(str(link)):
      raise PermissionError(1, f'{links} cannot be used')
    # An existing link is the same one, since its name is a hash of its target.
    with contextlib.suppress(FileExistsError):
      os.symlink(target, os.fsencode(link))
  except OSError as error:
    special = _SPECIAL.search(str(folder.absolute()))[0]
    raise UserError(
      f'{folder}: the path has {special!r} in it, and a link to it under {links} could not be made '
      f'({error.strerror}); choose a folder without it.'
    ) from None
  return link


def make(workdir, setting: str = '--workdir') -> None:
  """Makes a folder, and checks that it can be written.

  Raises:
    UserError: it cannot be made or written, such as without the rights or without the bucket.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_bucket(workdir):
      # With a bucket only a write shows whether it is allowed.
      (workdir / '.writable').write_text('\n')
    elif not os.access(workdir, os.W_OK):
      raise PermissionError(13, 'not writable')
  except Exception as error:  # every kind of bucket raises its own classes of errors
    if not is_bucket(workdir) and not isinstance(error, OSError):
      raise
    raise UserError(
      f'{setting}={workdir} cannot be written ({_why(error, workdir)}); choose another.'
    ) from None


def _why(error: Exception, path) -> str:
  """Returns the reason of a storage error, as a clause."""
  if isinstance(error, FileNotFoundError) and is_bucket(path):
    return 'no such bucket'
  return first_line(getattr(error, 'strerror', None) or error)


def size(path) -> int:
  """Returns the size of a file in bytes; -1 if it does not exist."""
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
  """Opens a text file for appending. In a bucket the text is written when the file is closed."""
  if not is_bucket(path):
    with path.open('a', encoding='utf-8') as file:
      yield file
    return
  file = io.StringIO()
  try:
    yield file
  finally:
    path.write_text((path.read_text() if path.exists() else '') + file.getvalue())


def write_atomic(path, content: str | bytes) -> None:
  """Writes a file whole or not at all, even if the process dies."""
  data = content.encode() if isinstance(content, str) else content
  if is_bucket(path):
    path.write_bytes(data)
    return
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_bytes(data)
    temporary.replace(path)
  except OSError:  # on a full disk the partial file would occupy the last bytes
    temporary.unlink(missing_ok=True)
    raise


def read_rows(path) -> list[dict]:
  """Returns the rows of a JSON-lines file, without a last line that is incomplete."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_bytes().splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def names(folder) -> set[str]:
  """Returns the names of the files in a folder; none if it does not exist.

  Raises:
    UserError: the folder cannot be read.
  """
  with _explained(f'cannot read {folder}', folder):
    try:
      return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
      return set()


def copy_files(source, target, files: Iterable[str], log: Callable[[str], None] = print) -> None:
  """Copies files from one folder to another in the given order, each whole or not at all.

  Args:
    source, target: folders; either may be in a bucket.
    files: names of the files.
    log: called with a line as each copy begins.

  Raises:
    UserError: a file could not be read or written.
  """
  verb, bucket = ('sending', target) if is_bucket(target) else ('fetching', source)
  with _explained(f'cannot write {target}', target):
    target.mkdir(parents=True, exist_ok=True)
  for name in files:
    log(f'{verb} {bucket / name}')
    with _explained(f'cannot read {source / name}', source):
      data = (source / name).read_bytes()
    with _explained(f'cannot write {target / name}', target):
      write_atomic(target / name, data)


@contextlib.contextmanager
def _explained(what: str, path):
  """Turns a storage error into a sentence that starts with `what`."""
  try:
    yield
  except Exception as error:  # every kind of bucket raises its own classes of errors
    if not is_bucket(path) and not isinstance(error, OSError):
      raise
    raise UserError(f'{what}: {_why(error, path)}.') from error


def key_value_store(folder):
  """Returns the TensorStore key-value store of a folder or a bucket, for conditional writes."""
  import tensorstore

  if is_bucket(folder):
    return tensorstore.KvStore.open(f'{folder}/').result()
  folder.mkdir(parents=True, exist_ok=True)
  # No fsync: a lease need not survive a power cut, which its worker would not survive either.
  context = {'file_io_sync': False}
  path = f'{plain_path(folder).absolute()}/'
  return tensorstore.KvStore.open({'driver': 'file', 'path': path, 'context': context}).result()
