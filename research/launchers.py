"""What starts a sweep's workers: a launcher knows a command and how many; the runs are the workers' affair.

A worker is `python -m research.sweep --gin_file=... --workdir=... --worker`. All state is in the workdir, so
any launcher, or several at once, may carry on where another stopped.
"""

import collections
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Protocol

from research import cli
from research.errors import Invalid, UserError, did_you_mean
from research.training import places

ROOT = pathlib.Path(__file__).resolve().parent.parent


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
    if not places.is_bucket(self.workdir):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Printed:
  """A launcher that only says what to run: the tool itself is the user's.

  Attributes:
    workers: slices, each with one worker.
    accelerator: the type of a slice, as the tool names it.
    zone: where.
    repository: what every host clones.
  """

  workers: int = 4
  accelerator: str = 'v5litepod-8'
  zone: str = 'us-central1-a'
  repository: str = '$REPOSITORY'

  def __post_init__(self):
    _check_workers(self)

  def run(self, job: Job) -> bool:
    if not places.is_bucket(job.workdir):
      print(f'# {job.workdir} must be a disk that all hosts share; or give --workdir=gs://...')
    print(self.text(job))
    print('# When they are done, the same command without --launcher fits the law and goes on.')
    return False

  def text(self, job: Job) -> str:
    """What to run, or a file's text."""
    raise NotImplementedError

  def worker(self, job: Job) -> str:
    """The shell command of a host: install, then work."""
    arguments = shlex.join([*job.arguments, f'--peers={self.workers}'])
    return (
      f'git clone {self.repository} isoflop && cd isoflop && pip install uv && '
      f'uv run --extra tpu python -m research.sweep {arguments}'
    )


class Gcloud(_Printed):
  """Queued resources of Cloud TPU: each a slice with one worker on every host."""

  def text(self, job: Job) -> str:
    lines = ['# Slices, asked for at once; each becomes ACTIVE when there is room.']
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus queued-resources create isoflop-{i} --node-id=isoflop-{i} '
        f'--zone={self.zone} --accelerator-type={self.accelerator} --runtime-version=v2-alpha-tpuv5-lite --spot'
      )
    lines.append('# A worker on each.')
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus tpu-vm ssh isoflop-{i} --zone={self.zone} --worker=all '
        f'--command={shlex.quote(self.worker(job))}'
      )
    lines.append('# Afterwards')
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus queued-resources delete isoflop-{i} --zone={self.zone} --force --quiet'
      )
    return '\n'.join(lines)


class Xpk(_Printed):
  """A workload on a GKE cluster that XPK made: one slice for each worker."""

  def text(self, job: Job) -> str:
    lines = [
      '# $CLUSTER is a cluster of `xpk cluster create`, $IMAGE an image with python and git.'
    ]
    for i in range(self.workers):
      lines.append(
        f'xpk workload create --cluster=$CLUSTER --workload=isoflop-{i} --tpu-type={self.accelerator} '
        f'--zone={self.zone} --num-slices=1 --docker-image=$IMAGE --max-restarts=10 '
        f'--command={shlex.quote(self.worker(job))}'
      )
    return '\n'.join(lines)


class SkyPilot(_Printed):
  """A SkyPilot task, one YAML file; a spot slice that is taken away is started again."""

  def text(self, job: Job) -> str:
    arguments = shlex.join([*job.arguments, f'--peers={self.workers}'])
    return f"""\
# isoflop.yaml; for i in $(seq {self.workers}): sky jobs launch --name isoflop-$i --yes isoflop.yaml
name: isoflop
resources:
  accelerators: tpu-{self.accelerator}
  zone: {self.zone}
  use_spot: true
  job_recovery: failover
setup: |
  git clone {self.repository} isoflop
  cd isoflop && pip install uv && uv sync --extra tpu
run: |
  cd isoflop && uv run --extra tpu python -m research.sweep {arguments}"""


NAMED = {'local': Local, 'slurm': Slurm, 'gcloud': Gcloud, 'xpk': Xpk, 'skypilot': SkyPilot}


def named(name: str) -> Launcher:
  """The launcher of that name with its defaults."""
  if name not in NAMED:
    raise UserError(f'--launcher={name}: no such launcher.{did_you_mean(name, NAMED)}')
  return NAMED[name]()
