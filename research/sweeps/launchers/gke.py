"""Manifests for Google Kubernetes Engine: workers on TPU slices, or a Ray cluster that does the sweep."""

import dataclasses
import re
import shlex

import yaml

from research.core.errors import Invalid, did_you_mean
from research.sweeps.launchers.cloud import Printed
from research.sweeps.launchers.job import Job

# The label of GKE's nodes, and the most chips of a slice that is one host ("Plan TPUs in GKE", in the
# documentation of Google Kubernetes Engine).
ACCELERATORS = {
  'v4': ('tpu-v4-podslice', 4),
  'v5e': ('tpu-v5-lite-podslice', 8),
  'v5p': ('tpu-v5p-slice', 4),
  'v6e': ('tpu-v6e-slice', 8),
}
APIS = ('jobset', 'kuberay')
RAY_FILE = 'gin/launchers/ray.gin'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gke(Printed):
  """Writes a manifest, and prints the commands that use it; starts nothing.

  Attributes:
    accelerator: a slice of one host by its sides, such as 'v5e:2x4'; each has one worker.
    api: 'jobset': a JobSet of workers, as if each were started by hand. 'kuberay': a RayJob, whose head hands
      the runs out and whose autoscaler adds and removes slices.
    image: of the Dockerfile of this project, in a registry that the cluster reads.
    name: of the JobSet or the RayJob.
    namespace: of Kubernetes; None for the current one.
    queue: the LocalQueue of Kueue that admits the job; None without Kueue.
    spot: whether the slices are spot capacity, which may be taken back.
    restarts: how often a worker that failed is started again; one that was preempted does not count.
  """

  accelerator: str = 'v5e:2x4'
  api: str = 'jobset'
  image: str = '$IMAGE'
  name: str = 'isoflop'
  namespace: str | None = None
  queue: str | None = None
  spot: bool = True
  restarts: int = 10

  def __post_init__(self):
    super().__post_init__()
    if self.api not in APIS:
      raise Invalid(Gke, 'api', f'{self.api!r} is not known.{did_you_mean(self.api, APIS)}')
    if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', self.name):
      why = f'{self.name!r} names objects of Kubernetes: at most 40 lower-case letters, digits and hyphens.'
      raise Invalid(Gke, 'name', why)
    if self.restarts < 0:
      raise Invalid(Gke, 'restarts', f'{self.restarts!r} must not be negative.')
    _slice(self.accelerator)

  def text(self, job: Job) -> str:
    """Writes the manifest beside the logs of the sweep; returns the commands that use it."""
    manifest = self.jobset(job) if self.api == 'jobset' else self.rayjob(job)
    path = job.logs / f'{self.name}.yaml'
    path.write_text(yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=1000))
    return f'docker build --tag {self.image} . && docker push {self.image}\nkubectl apply -f {path}'

  def jobset(self, job: Job) -> dict:
    """A JobSet with one Job a worker. A worker that fails is started again alone: the leases know its run."""
    command = ['python', '-m', 'research.sweep', *job.arguments, f'--peers={self.workers}']
    pod = self._pod({'name': 'worker', 'image': self.image, 'command': command})
    template = {
      'backoffLimit': self.restarts,
      # A pod that a preempted node took with it is made again without counting as a failure.
      'podFailurePolicy': {
        'rules': [{'action': 'Ignore', 'onPodConditions': [{'type': 'DisruptionTarget'}]}]
      },
      'template': {
        'metadata': {'labels': {'app': self.name}},
        'spec': {'restartPolicy': 'Never', **pod},
      },
    }
    return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': self._metadata(),
      'spec': {
        # The others go on where one worker failed for good: its run is given to them.
        'failurePolicy': {'maxRestarts': 0},
        'replicatedJobs': [
          {'name': 'worker', 'replicas': self.workers, 'template': {'spec': template}}
        ],
      },
    }

  def rayjob(self, job: Job) -> dict:
    """A RayJob: a head without TPUs that runs the sweep's command, and a group of slices for the runs."""
    arguments = [argument for argument in job.arguments if argument != '--worker']
    files = [argument for argument in arguments if argument.startswith('--gin_file=')]
    others = [argument for argument in arguments if argument not in files]
    chips = _slice(self.accelerator)[1]
    command = ['python', '-m', 'research.sweep', *files, f'--gin_file={RAY_FILE}', *others]
    command.append(f"--gin.Ray.resources={{'TPU': {chips}}}")
    limits = {'cpu': '4', 'memory': '16Gi'}
    head = {
      'name': 'head',
      'image': self.image,
      'resources': {'limits': limits, 'requests': limits},
    }
    worker = self._pod({'name': 'worker', 'image': self.image})
    group = {
      'groupName': 'slices',
      'replicas': self.workers,
      'minReplicas': 0,
      'maxReplicas': self.workers,
      'numOfHosts': 1,
      'rayStartParams': {},
      'template': {'spec': worker},
    }
    return {
      'apiVersion': 'ray.io/v1',
      'kind': 'RayJob',
      'metadata': self._metadata(),
      'spec': {
        'entrypoint': shlex.join(command),
        'shutdownAfterJobFinishes': True,
        'ttlSecondsAfterFinished': 600,
        'rayClusterSpec': {
          # Kueue admits a whole cluster, so under it the cluster keeps its size.
          'enableInTreeAutoscaling': self.queue is None,
          'headGroupSpec': {
            # No CPUs of the head for tasks: it only hands runs out.
            'rayStartParams': {'num-cpus': '0', 'dashboard-host': '0.0.0.0'},
            'template': {'spec': {'containers': [head]}},
          },
          'workerGroupSpecs': [group],
        },
      },
    }

  def _metadata(self) -> dict:
    metadata: dict = {'name': self.name}
    if self.namespace:
      metadata['namespace'] = self.namespace
    if self.queue:
      metadata['labels'] = {'kueue.x-k8s.io/queue-name': self.queue}
    return metadata

  def _pod(self, container: dict) -> dict:
    """The pod of one host: the nodes that may run it, and all chips of such a node."""
    label, chips, topology = _slice(self.accelerator)
    selector = {
      'cloud.google.com/gke-tpu-accelerator': label,
      'cloud.google.com/gke-tpu-topology': topology,
    }
    if self.spot:
      selector['cloud.google.com/gke-spot'] = 'true'
    tpus = {'google.com/tpu': str(chips)}
    return {
      'nodeSelector': selector,
      'containers': [{**container, 'resources': {'requests': tpus, 'limits': tpus}}],
    }


class _Plain(yaml.SafeDumper):
  """YAML in which a value that occurs twice is written twice, for people to read."""

  def ignore_aliases(self, data) -> bool:
    return True


def _slice(name: str) -> tuple[str, int, str]:
  """(GKE's accelerator, chips, topology) of a slice of one host, such as 'v5e:2x4'.

  Raises:
    Invalid: it is no slice, or one of several hosts.
  """
  kind, _, topology = name.partition(':')
  if kind not in ACCELERATORS or not re.fullmatch(r'\d+x\d+(x\d+)?', topology):
    why = f'{name!r} is no slice: write its generation and its sides, as in v5e:2x4.'
    raise Invalid(Gke, 'accelerator', why + did_you_mean(kind, ACCELERATORS))
  label, most = ACCELERATORS[kind]
  chips = 1
  for side in topology.split('x'):
    chips *= int(side)
  if chips > most:
    why = (
      f'{name!r} has {chips} chips, and a host of it at most {most}: a worker of a sweep is one '
      'host. For slices of several hosts use --launcher=xpk.'
    )
    raise Invalid(Gke, 'accelerator', why)
  return label, chips, topology
