"""What starts a sweep's workers: a launcher knows a command and how many; the runs are the workers' affair.

A worker is `python -m research.sweep --gin_file=... --workdir=... --worker`. All state is in the workdir, so
any launcher, or several at once, may carry on where another stopped.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Protocol

from research.core import cli, storage
from research.core.errors import Invalid

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Job:
  """What a launcher is to get done.

  Attributes:
    arguments: of `python -m research.sweep`, the flag --worker among them.
    workdir: of the sweep.
    todo: () -> how many runs are not over yet.
    watch: called about twice a second while waiting.
    hung: () -> process ids of this machine that hold an expired lease.
    at_once: () -> how many workers have something to do at the same time; None where each run is one's.
  """

  arguments: tuple[str, ...]
  workdir: pathlib.Path
  todo: Callable[[], int]
  watch: Callable[[], None] = lambda: None
  hung: Callable[[], set[int]] = set
  at_once: Callable[[], int] | None = None

  @property
  def logs(self) -> pathlib.Path:
    """A folder for what the workers print: the workdir, or where that is a bucket one of this machine."""
    if not storage.is_bucket(self.workdir):
      return self.workdir
    logs = pathlib.Path('runs') / self.workdir.name
    logs.mkdir(parents=True, exist_ok=True)
    return logs


class Launcher(Protocol):
  """Starts workers and waits until the job is done, or prints how to start them."""

  def run(self, job: Job) -> bool:
    """True when the runs are over; False when the workers are for the user to start."""
    ...


def environment() -> dict[str, str]:
  """Of a worker: the project can be imported wherever it was started."""
  paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))
  return {**os.environ, **cli.CPU_ENVIRONMENT, 'PYTHONPATH': paths}


def _check_workers(launcher) -> None:
  if launcher.workers is not None and launcher.workers < 1:
    raise Invalid(type(launcher), 'workers', f'{launcher.workers!r} must be positive.')
