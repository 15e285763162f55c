"""FIXME: say what this module is."""

import pathlib

import jax

from research.core import storage
from research.core.errors import UserError
from research.training.run import Run


def open_workdir(workdir: pathlib.Path, run: Run, config_text: str) -> None:
  """Makes the folder, or checks that it holds this very run.

  Raises:
    UserError: it cannot be written, or holds another run.
  """
  storage.make(workdir)
  identity, path = run.identity(), workdir / 'config.txt'
  if path.exists() and path.read_text() != identity:
    there, here = path.read_text().splitlines(), identity.splitlines()
    old, new = next(
      (pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), ('', '')
    )
    raise UserError(
      f'--workdir={workdir} holds a different run ("{old.strip()}" there, "{new.strip()}" here); '
      'choose another workdir, or delete that one.'
    )
  if jax.process_index() == 0:
    storage.write_atomic(path, identity)
    storage.write_atomic(workdir / 'config.gin', config_text)
