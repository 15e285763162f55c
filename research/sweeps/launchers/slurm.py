"""Workers as jobs of a Slurm cluster, through submitit."""

import dataclasses
import os
import signal
import subprocess
import time

from research.core.errors import UserError, first_line
from research.sweeps.launchers.job import Job, check_workers, environment


class _SlurmWorker:
  """What submitit pickles and calls on a node. A job that is stopped saves its run and is queued again."""

  def __init__(self, command: list[str]):
    self.command, self.process = command, None

  def __call__(self) -> int:
    # submitit's signal reaches all processes of the job. This one answers it, and sends SIGTERM to the worker.
    def ignore():
      signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    self.process = subprocess.Popen(self.command, env=environment(), preexec_fn=ignore)
    return self.process.wait()

  def checkpoint(self):
    """Called by submitit before the job ends: stops the worker, and says what to queue instead."""
    from submitit.helpers import DelayedSubmission

    if self.process is not None:
      self.process.send_signal(signal.SIGTERM)
      self.process.wait()
    return DelayedSubmission(_SlurmWorker(self.command))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
  """Jobs of a Slurm cluster whose nodes share the workdir, through submitit (`uv pip install submitit`).

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
    check_workers(self)

  def run(self, job: Job) -> bool:
    """Submits the workers and waits for rows. Submits them again if all end before the runs do.

    Raises:
      UserError: submitit is not installed, Slurm refuses the jobs, or they end three times too early.
    """
    jobs = self.submit(job)
    checked, resubmitted = time.monotonic(), 0
    while job.todo():
      time.sleep(0.5)
      job.watch()
      if time.monotonic() - checked > 30:  # each question is a load on Slurm's controller
        checked = time.monotonic()
        if not self.queued(jobs) and job.todo():
          resubmitted += 1
          if resubmitted > 3:
            raise UserError(f'the Slurm jobs ended before the runs; see {job.logs}/slurm')
          jobs = self.submit(job)
    return True

  @staticmethod
  def queued(jobs: list) -> bool:
    """Whether any of the jobs runs or waits; True where Slurm does not answer."""
    answer = subprocess.run(['squeue', '-h', '-o', '%i'], capture_output=True, text=True)
    return answer.returncode != 0 or bool({j.job_id for j in jobs} & set(answer.stdout.split()))

  def submit(self, job: Job) -> list:
    """Submits one job for each worker; returns submitit's jobs."""
    try:
      import submitit
    except ImportError:
      raise UserError('--launcher=slurm needs submitit: uv pip install submitit') from None
    folder = job.logs / 'slurm'
    executor = submitit.AutoExecutor(folder=str(folder), cluster='slurm')
    executor.update_parameters(timeout_min=self.minutes, name='isoflop', **self.parameters)
    peers = min(self.workers, job.todo())
    os.environ.update(environment())  # sbatch hands this process's environment to its jobs
    try:
      return [executor.submit(_SlurmWorker(job.command(peers))) for _ in range(peers)]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
      raise UserError(f'Slurm refused the workers: {first_line(error)}') from None
