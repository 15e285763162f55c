"""Opens the workdir of a run. A workdir belongs to one run only."""

import collections
import itertools
import pathlib

import jax

from research.core import configs, moved, storage
from research.core.errors import UserError
from research.training.run import Run


def open_workdir(workdir: pathlib.Path, run: Run, config_text: str) -> None:
  """Makes the folder, or checks that it holds this run; writes config.txt and config.gin.

  Args:
    workdir: the folder or bucket.
    run: the run.
    config_text: its gin text.

  Raises:
    UserError: the folder cannot be written, or holds another run.
  """
  storage.make(workdir)
  identity = run.identity()
  path = workdir / 'config.txt'
  if path.exists():
    saved = _current_text(path.read_text())
    if saved != identity and not _is_same_run(saved, identity, workdir / 'config.gin'):
      raise _other_run(workdir, saved, identity)
  if jax.process_index() == 0:
    storage.write_atomic(path, identity)
    storage.write_atomic(workdir / 'config.gin', config_text)


def _current_text(text: str) -> str:
  """Returns the text of an earlier version's config.txt as this version writes it.

  Earlier versions had other names of modules, and the field Run.z_loss.
  """
  return moved.current_paths(text).replace('\nz_loss = 0.0\n', '\n')


def _is_same_run(saved: str, identity: str, config_gin: pathlib.Path) -> bool:
  """Returns whether an earlier version wrote this run, before this version added fields at their defaults.

  In that case the new text has every line of the saved one, and this version builds the same run from the saved
  gin file.
  """
  missing = collections.Counter(saved.splitlines()) - collections.Counter(identity.splitlines())
  if missing or not config_gin.exists():
    return False
  try:
    return configs.load(str(config_gin)).build().identity() == identity
  except UserError:
    return False


def _other_run(workdir: pathlib.Path, saved: str, identity: str) -> UserError:
  pairs = itertools.zip_longest(saved.splitlines(), identity.splitlines(), fillvalue='')
  old, new = next(pair for pair in pairs if pair[0] != pair[1])
  return UserError(
    f'--workdir={workdir} holds a different run ("{old.strip()}" there, "{new.strip()}" here); '
    'choose another workdir, or delete that one.'
  )
