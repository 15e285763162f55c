"""The folders of a run's checkpoints: lists the complete ones, and copies one."""

import os
import shutil

from research.core.storage import is_bucket

# Orbax writes this file last, where a folder cannot be renamed into place: it marks a checkpoint as complete.
COMMITTED = 'commit_success.txt'


def saved_steps(checkpoints) -> list[int]:
  """Returns the steps of a run's complete checkpoints, in order."""
  try:
    folders = [folder for folder in checkpoints.iterdir() if folder.name.isdigit()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  if is_bucket(checkpoints):  # the files of a checkpoint appear one by one
    folders = [folder for folder in folders if (folder / COMMITTED).exists()]
  return sorted(int(folder.name) for folder in folders)


def copy_checkpoint(source, target) -> None:
  """Copies a checkpoint. `target` exists only once the copy is complete."""
  if not is_bucket(target):
    partial = target.with_name(f'partial.{os.getpid()}')
    shutil.copytree(source, partial)
    partial.rename(target)
    return

  # Marks are copied last. The checkpoint's own is the shallowest, so it comes after those of its parts.
  def order(file):
    return file.name == COMMITTED, -len(file.parts)

  for file in sorted(_files(source), key=order):
    file.copy(target / file.relative_to(source), overwrite=True)


def _files(folder):
  """Yields every file below a folder."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path
