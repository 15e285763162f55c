"""Launchers that print what to run on TPU slices: by gcloud, XPK or SkyPilot (`gke` has Kubernetes')."""

import dataclasses
import shlex

from research.core import storage
from research.sweeps.launchers.job import Job, check_workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Printed:
  """A launcher that prints the commands of another tool and runs none of them.

  Attributes:
    workers: how many slices, each with one worker.
    accelerator: the type of a slice, as the tool names it.
    zone: the cloud's zone of the slices.
    repository: the URL of the repository that every host clones.
  """

  workers: int = 4
  accelerator: str = 'v5litepod-8'
  zone: str = 'us-central1-a'
  repository: str = '$REPOSITORY'

  def __post_init__(self):
    check_workers(self)

  def run(self, job: Job) -> bool:
    """Prints what to run, and leaves it to the user."""
    if not storage.is_bucket(job.workdir):
      print(f'# {job.workdir} must be a disk that all hosts share; or give --workdir=gs://...')
    print(self.text(job))
    print('# When they are done, the same command without --launcher fits the law and goes on.')
    return False

  def text(self, job: Job) -> str:
    """The commands to run, or the text of a file for the tool."""
    raise NotImplementedError

  def worker(self, job: Job) -> str:
    """The shell command of one host: it installs the project, then works."""
    return (
      f'git clone {self.repository} isoflop && cd isoflop && pip install uv && {self.command(job)}'
    )

  def command(self, job: Job) -> str:
    """The worker itself, in a checkout of the project on a TPU host."""
    arguments = shlex.join([*job.arguments, f'--peers={self.workers}'])
    return f'uv run --extra tpu python -m research.sweep {arguments}'


class Gcloud(Printed):
  """Queued resources of Cloud TPU, each a slice whose hosts are one worker together."""

  def text(self, job: Job) -> str:
    lines = ['# Request all slices at once; each becomes ACTIVE when there is room for it.']
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus queued-resources create isoflop-{i} --node-id=isoflop-{i} '
        f'--zone={self.zone} --accelerator-type={self.accelerator} '
        '--runtime-version=v2-alpha-tpuv5-lite --spot'
      )
    lines.append('# Start a worker on each.')
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus tpu-vm ssh isoflop-{i} --zone={self.zone} --worker=all '
        f'--command={shlex.quote(self.worker(job))}'
      )
    lines.append('# Delete them afterwards.')
    for i in range(self.workers):
      lines.append(
        f'gcloud compute tpus queued-resources delete isoflop-{i} --zone={self.zone} --force --quiet'
      )
    return '\n'.join(lines)


class Xpk(Printed):
  """A workload on a GKE cluster that XPK made: one slice for each worker."""

  def text(self, job: Job) -> str:
    lines = [
      '# $CLUSTER is a cluster of `xpk cluster create`, $IMAGE an image with python and git.'
    ]
    for i in range(self.workers):
      lines.append(
        f'xpk workload create --cluster=$CLUSTER --workload=isoflop-{i} '
        f'--tpu-type={self.accelerator} --zone={self.zone} --num-slices=1 --docker-image=$IMAGE '
        f'--max-restarts=10 --command={shlex.quote(self.worker(job))}'
      )
    return '\n'.join(lines)


class SkyPilot(Printed):
  """A SkyPilot task in one YAML file. SkyPilot starts a spot slice again after it was taken away."""

  def text(self, job: Job) -> str:
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
  cd isoflop && {self.command(job)}"""
