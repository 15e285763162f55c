"""FIXME: say what this module is."""

import dataclasses
import shlex

from research.core import storage
from research.sweeps.launchers.job import Job, _check_workers


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
    if not storage.is_bucket(job.workdir):
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
