"""FIXME: say what this module is."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

from research.core.errors import UserError
from research.sweeps.launchers.job import Job, _check_workers, environment


class _SlurmWorker:
  """What submitit pickles and calls on a node; asked to stop, it saves and is queued again."""

  def __init__(self, command: list[str]):
    self.command, self.process = command, None

  def __call__(self) -> int:
    # submitit's signal comes to all processes of the job: this one answers it, and tells the worker.
    ignore = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    self.process = subprocess.Popen(self.command, env=environment(), preexec_fn=ignore)
    return self.process.wait()

  def checkpoint(self):
    from submitit.helpers import DelayedSubmission

    if self.process is not None:
      self.process.send_signal(signal.SIGTERM)
      self.process.wait()
    return DelayedSubmission(_SlurmWorker(self.command))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
  """Jobs of a Slurm cluster, through submitit (`uv pip install submitit`), whose nodes share the workdir.

  A job that is preempted, or runs out of time, saves its run and is queued again.

  Attributes:
    workers: jobs at a time.
    minutes: the time limit of a job.
    parameters: more of submitit's, such as {'slurm_partition': 'gpu', 'gpus_per_node': 1, 'cpus_per_task': 8}.
  """

  workers: int = 2
  minutes: int = 240
  parameters: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    _check_workers(self)

  def run(self, job: Job) -> bool:
    """Submits the workers and waits for rows; workers are submitted again while there are none left.

    Raises:
      UserError: no submitit, or Slurm refuses.
    """
    jobs = self.submit(job)
    looked, resubmitted = time.monotonic(), 0
    while job.todo():
      time.sleep(0.5)
      job.watch()
      if time.monotonic() - looked > 30:
        looked = time.monotonic()
        if not self.queued(jobs) and job.todo():
          resubmitted += 1
          if resubmitted > 3:
            raise UserError(f'the Slurm jobs ended before the runs; see {job.logs}/slurm')
          jobs = self.submit(job)
    return True

  @staticmethod
  def queued(jobs: list) -> bool:
    """Whether any of the jobs runs or waits."""
    found = subprocess.run(['squeue', '-h', '-o', '%i'], capture_output=True, text=True)
    return found.returncode != 0 or bool({j.job_id for j in jobs} & set(found.stdout.split()))

  def submit(self, job: Job) -> list:
    try:
      import submitit
    except ImportError:
      raise UserError('--launcher=slurm needs submitit: uv pip install submitit') from None
    folder = job.logs / 'slurm'
    executor = submitit.AutoExecutor(folder=str(folder), cluster='slurm')
    executor.update_parameters(timeout_min=self.minutes, name='isoflop', **self.parameters)
    peers = min(self.workers, job.todo())
    command = [sys.executable, '-m', 'research.sweep', *job.arguments, f'--peers={peers}']
    os.environ.update(environment())  # what a job is given
    try:
      return [executor.submit(_SlurmWorker(command)) for _ in range(peers)]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
      raise UserError(f'Slurm refused the workers: {str(error).splitlines()[0]}') from None
