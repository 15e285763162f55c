"""What a launcher is, and the job that it is given: to start workers of a sweep.

A worker is `python -m research.sweep --gin_file=... --workdir=... --worker`; it chooses its runs itself. All
state is in the workdir, so any launcher, or several at once, may continue where another stopped.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Protocol

from research.core import cli, storage
from research.core.errors import Invalid

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Job:
  """The runs of a sweep that workers are to do.

  Attributes:
    arguments: of the command `python -m research.sweep` of a worker, the flag --worker among them.
    workdir: the sweep's.
    todo: returns how many runs are not over yet.
    watch: to be called about twice a second while the launcher waits; it updates the table of runs.
    hung: returns the process ids on this machine that own an expired lease.
    at_once: returns how many workers have something to do at the same time; None where that is `todo`.
    dispatch: returns the `sweeps.dispatch.Dispatch` of the runs, for a launcher that gives them out itself.
  """

  arguments: tuple[str, ...]
  workdir: pathlib.Path
  todo: Callable[[], int]
  watch: Callable[[], None] = lambda: None
  hung: Callable[[], set[int]] = set
  at_once: Callable[[], int] | None = None
  dispatch: Callable | None = None

  @property
  def logs(self) -> pathlib.Path:
    """A local folder for what the workers print: the workdir, or if that is a bucket `runs/<its name>`."""
    if not storage.is_bucket(self.workdir):
      return self.workdir
    logs = pathlib.Path('runs') / self.workdir.name
    logs.mkdir(parents=True, exist_ok=True)
    return logs

  def command(self, peers: int) -> list[str]:
    """The command of one worker of `peers` on a machine with this Python and this checkout."""
    return [sys.executable, '-m', 'research.sweep', *self.arguments, f'--peers={peers}']


class Launcher(Protocol):
  """Starts workers and waits until the job is done, or prints how to start them.

  One of your own is any class with this method, in any module that Python can import: docs/sweeps.md.
  """

  def run(self, job: Job) -> bool:
    """Gets the runs done: True when all are over, False when the user has to start the workers."""
    ...


def environment() -> dict[str, str]:
  """The environment of a worker's process: it can import this project from any working folder."""
  paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))
  return {**os.environ, **cli.CPU_ENVIRONMENT, 'PYTHONPATH': paths}


def check_workers(launcher) -> None:
  """Raises Invalid where a launcher's field `workers` is not positive; None is left to the launcher."""
  if launcher.workers is not None and launcher.workers < 1:
    raise Invalid(type(launcher), 'workers', f'{launcher.workers!r} must be positive.')
