"""Workers as processes of this machine."""

import collections
import dataclasses
import os
import subprocess
import time

from research.core.errors import UserError
from research.sweeps.launchers.job import Job, check_workers, environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
  """Processes on this machine, among which its processor cores are divided.

  Attributes:
    workers: how many at most; None for one per core. If fewer have something to do, each gets more cores.
  """

  workers: int | None = None

  def __post_init__(self):
    check_workers(self)

  def run(self, job: Job) -> bool:
    """Starts the workers and waits. Starts a dead worker again, and kills a hung one.

    Raises:
      UserError: workers die again and again before they take a run.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]
    peers = min(self.workers or len(cores), (job.at_once or job.todo)())
    shares = [cores[i::peers] or cores for i in range(peers)]
    workers = {i: self.start(job, share, peers) for i, share in enumerate(shares)}
    early_deaths = collections.Counter()
    checked = time.monotonic()
    try:
      while workers:
        time.sleep(0.5)
        job.watch()
        if time.monotonic() - checked > 5:  # to ask for hung workers reads every lease
          checked = time.monotonic()
          kill_hung(workers, job)
        for i, worker in list(workers.items()):
          if worker.poll() is None:
            continue
          del workers[i]
          if not job.todo():
            continue
          took_a_run = (job.workdir / 'workers' / str(worker.pid)).exists()
          early_deaths[i] = 0 if took_a_run else early_deaths[i] + 1
          # An error would come again. A signal (preemption, no memory) may have had nothing to do with the run.
          if early_deaths[i] > (3 if worker.returncode > 0 else 20):
            log = job.logs / 'workers.log'
            raise UserError(
              f'worker {i} died {early_deaths[i]} times before it took a run; see {log}'
            )
          workers[i] = self.start(job, shares[i], peers)
    finally:
      for worker in workers.values():
        worker.terminate()
      for worker in workers.values():
        worker.wait()
    return True

  @staticmethod
  def start(job: Job, cores: list[int], peers: int) -> subprocess.Popen:
    """Starts one worker, on these cores alone."""
    command = job.command(peers)
    if hasattr(os, 'sched_setaffinity'):  # macOS has no such thing
      command.append(f'--cores={",".join(map(str, cores))}')
    with (job.logs / 'workers.log').open('a') as log:
      return subprocess.Popen(command, env=environment(), stdout=log, stderr=log)


def kill_hung(workers: dict[int, subprocess.Popen], job: Job) -> None:
  """Kills the workers that own an expired lease: they neither make progress nor end."""
  hung = job.hung()
  for worker in workers.values():
    if worker.pid in hung:
      worker.kill()
