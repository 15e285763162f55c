"""The folders of a run's checkpoints: which are whole, and how one is copied."""

import os
import shutil

from research.core.storage import is_bucket

# Orbax's mark of a checkpoint that is whole, where a folder cannot be renamed into place.
COMMITTED = 'commit_success.txt'


def saved_steps(checkpoints) -> list[int]:
  """The steps of a run's checkpoints that are whole."""
  try:
    folders = [folder for folder in checkpoints.iterdir() if folder.name.isdigit()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  if is_bucket(checkpoints):  # its files appear one by one, and this the last
    folders = [folder for folder in folders if (folder / COMMITTED).exists()]
  return sorted(int(folder.name) for folder in folders)


def copy_checkpoint(source, target) -> None:
  """Copies a checkpoint; `target` is there when all of it is."""
  if not is_bucket(target):
    partial = target.with_name(f'partial.{os.getpid()}')
    shutil.copytree(source, partial)
    partial.rename(target)
    return
  # Its own mark is the last: the shallowest of them.
  files = sorted(_files(source), key=lambda file: (file.name == COMMITTED, -len(file.parts)))
  for file in files:
    file.copy(target / file.relative_to(source), overwrite=True)


def _files(folder):
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path
