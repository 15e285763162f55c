"""FIXME: say what this module is."""

import collections
import dataclasses
import os
import subprocess
import sys
import time

from research.core.errors import UserError
from research.sweeps.launchers.job import Job, _check_workers, environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
  """Processes on this machine, its processor cores divided between them.

  Attributes:
    workers: how many at most; None for one a core. Where fewer have something to do, fewer share the cores.
  """

  workers: int | None = None

  def __post_init__(self):
    _check_workers(self)

  def run(self, job: Job) -> bool:
    """A worker that dies is started again; one that hangs is killed first.

    Raises:
      UserError: workers die before they take a run.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]
    n = min(self.workers or len(cores), (job.at_once or job.todo)())
    shares = [cores[i::n] or cores for i in range(n)]
    workers = {i: self.start(job, share, n) for i, share in enumerate(shares)}
    short, looked = collections.Counter(), time.monotonic()
    try:
      while workers:
        time.sleep(0.5)
        job.watch()
        if time.monotonic() - looked > 5:
          looked = time.monotonic()
          hung = job.hung()
          for worker in workers.values():
            if worker.pid in hung:
              worker.kill()
        for i, worker in list(workers.items()):
          if worker.poll() is None:
            continue
          del workers[i]
          if not job.todo():
            continue
          began = (job.workdir / 'workers' / str(worker.pid)).exists()
          short[i] = 0 if began else short[i] + 1
          # An error comes again; a signal (preemption, no memory) may have been another's affair.
          if short[i] > (3 if worker.returncode > 0 else 20):
            log = job.logs / 'workers.log'
            raise UserError(f'worker {i} died {short[i]} times before it took a run; see {log}')
          workers[i] = self.start(job, shares[i], n)
    finally:
      for worker in workers.values():
        worker.terminate()
      for worker in workers.values():
        worker.wait()
    return True

  @staticmethod
  def start(job: Job, cores: list[int], peers: int) -> subprocess.Popen:
    command = [sys.executable, '-m', 'research.sweep', *job.arguments, f'--peers={peers}']
    if hasattr(os, 'sched_setaffinity'):  # so that workers do not disturb each other
      command.append(f'--cores={",".join(map(str, cores))}')
    with (job.logs / 'workers.log').open('a') as log:
      return subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
