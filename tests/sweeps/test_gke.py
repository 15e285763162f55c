"""Manifests of --launcher=gke, held to the fields that the APIs' own definitions have; and their image.

The schemas are written down from the CustomResourceDefinitions jobset.x-k8s.io/v1alpha2 (config/components/crd
of JobSet) and ray.io/v1 (ray-operator/config/crd of KubeRay), and from the API reference of Kubernetes for Jobs
and pods. They have the fields that manifests may use; a field that a schema does not have is refused.
"""

import dataclasses
import pathlib
import re
import shlex
import tomllib

import pytest
import yaml
from test_launchers import JOB, commands, worker_flags

from research.core import cli
from research.core.errors import Invalid, UserError
from research.sweeps.launchers import by_name
from research.sweeps.launchers.gke import Gke

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = {'type': 'string'}
COUNT = {'type': 'integer', 'minimum': 0}
FLAG = {'type': 'boolean'}
TEXTS = {'type': 'object', 'additionalProperties': TEXT}


def fields(required=(), **properties) -> dict:
  return {
    'type': 'object', 'properties': properties, 'required': list(required), 'additionalProperties': False,
  }  # fmt: skip


def items(of: dict, least: int = 1) -> dict:
  return {'type': 'array', 'items': of, 'minItems': least}


METADATA = fields(['name'], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
RESOURCES = fields(limits=TEXTS, requests=TEXTS)
ENVIRONMENT = items(fields(['name'], name=TEXT, value=TEXT), least=0)
CONTAINER = fields(
  ['name', 'image'],
  name=TEXT, image=TEXT, command=items(TEXT), args=items(TEXT), env=ENVIRONMENT, resources=RESOURCES,
)  # fmt: skip
POD = fields(
  ['containers'],
  containers=items(CONTAINER),
  nodeSelector=TEXTS,
  restartPolicy={'enum': ['Always', 'OnFailure', 'Never']},
  serviceAccountName=TEXT,
)
POD_TEMPLATE = fields(['spec'], metadata=fields(labels=TEXTS, annotations=TEXTS), spec=POD)
POD_FAILURE_RULE = fields(
  ['action'],
  action={'enum': ['FailJob', 'FailIndex', 'Ignore', 'Count']},
  onPodConditions=items(fields(['type'], type=TEXT, status={'enum': ['True', 'False', 'Unknown']})),
)
JOB_SPEC = fields(
  ['template'],
  backoffLimit=COUNT,
  parallelism=COUNT,
  completions=COUNT,
  completionMode={'enum': ['NonIndexed', 'Indexed']},
  podFailurePolicy=fields(['rules'], rules=items(POD_FAILURE_RULE)),
  template=POD_TEMPLATE,
)
REPLICATED_JOB = fields(
  ['name', 'template'],
  name=TEXT, replicas=COUNT, groupName=TEXT, template=fields(['spec'], metadata=METADATA, spec=JOB_SPEC),
)  # fmt: skip
FAILURE_POLICY = fields(
  maxRestarts=COUNT, restartStrategy={'enum': ['Recreate', 'BlockingRecreate']}
)
JOBSET = fields(
  ['apiVersion', 'kind', 'metadata', 'spec'],
  apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata=METADATA,
  spec=fields(
    ['replicatedJobs'], replicatedJobs=items(REPLICATED_JOB), failurePolicy=FAILURE_POLICY, suspend=FLAG,
  ),
)  # fmt: skip
GROUP = fields(
  ['groupName', 'minReplicas', 'maxReplicas', 'template'],
  groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT,
  rayStartParams=TEXTS, template=POD_TEMPLATE,
)  # fmt: skip
RAY_CLUSTER = fields(
  ['headGroupSpec'],
  enableInTreeAutoscaling=FLAG,
  rayVersion=TEXT,
  headGroupSpec=fields(['template'], rayStartParams=TEXTS, template=POD_TEMPLATE),
  workerGroupSpecs=items(GROUP),
)
RAYJOB = fields(
  ['apiVersion', 'kind', 'metadata', 'spec'],
  apiVersion={'const': 'ray.io/v1'},
  kind={'const': 'RayJob'},
  metadata=METADATA,
  spec=fields(
    entrypoint=TEXT, shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT, suspend=FLAG,
    rayClusterSpec=RAY_CLUSTER,
  ),
)  # fmt: skip


def written(launcher: Gke, folder: pathlib.Path, capsys) -> dict:
  """The manifest that a launcher writes, held to its schema."""
  jsonschema = pytest.importorskip('jsonschema')
  assert launcher.run(dataclasses.replace(JOB, workdir=folder)) is False
  build, apply = commands(capsys.readouterr().out)
  assert build[:4] == ['docker', 'build', '--tag', launcher.image]
  assert apply[:3] == ['kubectl', 'apply', '-f']
  text = pathlib.Path(apply[3]).read_text()
  assert '&id' not in text
  manifest = yaml.safe_load(text)
  jsonschema.validate(manifest, {'JobSet': JOBSET, 'RayJob': RAYJOB}[manifest['kind']])
  return manifest


def test_a_jobset_of_workers(tmp_path, capsys):
  launcher = Gke(workers=3, accelerator='v6e:2x4', image='eu/isoflop', queue='research')
  manifest = written(launcher, tmp_path, capsys)
  assert manifest['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'research'}
  (job,) = manifest['spec']['replicatedJobs']
  assert job['replicas'] == 3
  pod = job['template']['spec']['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
    'cloud.google.com/gke-tpu-topology': '2x4',
    'cloud.google.com/gke-spot': 'true',
  }
  (container,) = pod['containers']
  assert container['image'] == 'eu/isoflop'
  assert container['resources']['limits'] == {'google.com/tpu': '8'}
  flags = worker_flags(shlex.join(container['command']))
  assert (flags.worker, flags.peers, flags.workdir) == (True, '3', 'gs://b/q')
  assert flags.gin == ["Sweep.question='Why?'"]


def test_a_rayjob_that_hands_the_runs_out(tmp_path, capsys):
  manifest = written(
    Gke(api='kuberay', accelerator='v5p:2x2x1', namespace='lab', spot=False), tmp_path, capsys
  )
  assert manifest['metadata'] == {'name': 'isoflop', 'namespace': 'lab'}
  cluster = manifest['spec']['rayClusterSpec']
  (group,) = cluster['workerGroupSpecs']
  assert (group['replicas'], group['minReplicas'], group['maxReplicas']) == (4, 0, 4)
  (worker,) = group['template']['spec']['containers']
  assert worker['resources']['limits'] == {'google.com/tpu': '4'}
  assert 'cloud.google.com/gke-spot' not in group['template']['spec']['nodeSelector']
  assert cluster['headGroupSpec']['rayStartParams']['num-cpus'] == '0'
  command = shlex.split(manifest['spec']['entrypoint'])
  assert command[:3] == ['python', '-m', 'research.sweep']
  parser = cli.parser('sweep', '')
  parser.add_argument('--workdir')
  flags = cli.parse(parser, command[3:])  # and no --worker: the head gives the runs out
  assert flags.gin_file == ['gin/sweeps/quickstart.gin', 'gin/launchers/ray.gin']
  assert flags.gin == ["Sweep.question='Why?'", "Ray.resources={'TPU': 4}"]


def test_kueue_admits_a_ray_cluster_of_fixed_size(tmp_path, capsys):
  manifest = written(Gke(api='kuberay', queue='research'), tmp_path, capsys)
  assert manifest['spec']['rayClusterSpec']['enableInTreeAutoscaling'] is False
  assert manifest['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'research'}


def test_a_field_that_an_api_does_not_have_is_refused(tmp_path, capsys):
  jsonschema = pytest.importorskip('jsonschema')
  manifest = written(Gke(), tmp_path, capsys)
  manifest['spec']['replicatedJobs'][0]['template']['spec']['restarts'] = 3
  with pytest.raises(jsonschema.ValidationError, match="'restarts' was unexpected"):
    jsonschema.validate(manifest, JOBSET)


def test_the_sweep_goes_on_where_ray_gin_sets_the_launcher():
  from research.core import configs

  files = ['gin/sweeps/quickstart.gin', 'gin/launchers/ray.gin']
  launcher = configs.load(files, ["Ray.resources={'TPU': 4}"], root='SWEEP').build().launcher
  assert launcher == by_name.Ray(resources={'TPU': 4})


@pytest.mark.parametrize(
  ('field', 'why'),
  [
    ({'accelerator': 'v5e:4x4'}, r"Gke\.accelerator: 'v5e:4x4' has 16 chips, and a host of it at most 8"),
    ({'accelerator': 'v5litepod-8'}, r"'v5litepod-8' is no slice"),
    ({'api': 'jobsets'}, r"Gke\.api: 'jobsets' is not known. Did you mean jobset\?"),
    ({'name': 'My_Sweep'}, r"Gke\.name: 'My_Sweep' names objects of Kubernetes"),
    ({'restarts': -1}, r'Gke\.restarts: -1 must not be negative'),
    ({'workers': 0}, r'Gke\.workers: 0 must be positive'),
  ],
)  # fmt: skip
def test_what_gke_would_refuse_is_refused(field, why):
  with pytest.raises(Invalid, match=why):
    Gke(**field)
  assert issubclass(Invalid, UserError)


def test_the_image_is_made_of_what_the_repository_has():
  text = (ROOT / 'Dockerfile').read_text()
  for line in re.findall(r'^COPY (.+)$', text, re.MULTILINE):
    *sources, _ = line.split()
    assert all((ROOT / source).exists() for source in sources), line
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = set(re.findall(r'--extra (\w+)', text))
  assert extras
  assert extras <= set(project['optional-dependencies'])
  python = re.search(r'^FROM python:(\d+\.\d+)', text, re.MULTILINE)[1]
  assert project['requires-python'] == f'>={python},<3.14'
  assert 'uv sync --locked' in text
