"""A run whose rollouts are sampled on a Ray cluster beside the learner is the local one, to the bit."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from research.core.errors import Invalid
from research.parallel.mesh import Mesh
from research.reinforcement.samplers import OnRay, Samplers
from research.training.program import make_program
from tests.reinforcement.small import described, load, make_base, saved, train

pytestmark = [
  pytest.mark.usefixtures('one_device'),
  pytest.mark.filterwarnings(
    'ignore::ResourceWarning',
    'ignore::pytest.PytestUnraisableExceptionWarning',
    'ignore:os.fork:RuntimeWarning',
  ),
]


def trained(run, samplers, workdir) -> tuple[list[dict], dict[str, np.ndarray]]:
  """(the rows of metrics without times, the parameters) of the run with these samplers."""
  rollouts = dataclasses.replace(run.train, samplers=samplers)
  train(dataclasses.replace(run, train=rollouts), workdir)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  names = ('step', 'loss', 'reward', 'kl', 'entropy', 'completion_length', 'grad_norm')
  return [{name: row.get(name) for name in names} for row in lines], saved(workdir)


def assert_equal(one, other):
  assert one[0] == other[0]
  assert any(row['reward'] is not None for row in one[0])
  assert one[1].keys() == other[1].keys()
  for name, value in one[1].items():
    np.testing.assert_array_equal(value, other[1][name], err_msg=name)


def test_parts_are_the_rows_of_the_whole(text_file):
  """The same tokens; numbers to float32's last bits, because a part is a batch of another shape."""
  run = load(text_file).build()
  batches = []
  with Mesh().use(jax.devices()[:1]):
    program = make_program(run)
    params = jax.jit(program.init)(jax.random.key(1))['params']
    for parts in (1, 2):
      rollouts = dataclasses.replace(run.train, samplers=Samplers(parts=parts))
      opened = rollouts.open(dataclasses.replace(run, train=rollouts))
      batches.append(next(opened.batches(program, 0, lambda: params))[0])
  whole, parts = batches
  assert whole.keys() == parts.keys()
  for name, value in whole.items():
    if value.dtype == np.int32:
      np.testing.assert_array_equal(value, parts[name], err_msg=name)
    else:
      np.testing.assert_allclose(value, parts[name], atol=1e-5, err_msg=name)


def test_what_is_wrong_with_samplers_is_told(text_file):
  with pytest.raises(Invalid, match=r'OnRay\.parts: 0 must be a positive whole number'):
    OnRay(parts=0)
  with pytest.raises(Invalid, match=r'OnRay\.cpus: 0, and nothing else that a task takes'):
    OnRay(cpus=0)
  with pytest.raises(Invalid, match=r'OnRay\.gpus: -1 must not be negative'):
    OnRay(gpus=-1)
  run = load(text_file).build()
  rollouts = dataclasses.replace(run.train, samplers=Samplers(parts=1000))
  with pytest.raises(
    Invalid, match=r'Samplers\.parts: the \d+ prompts of a round cannot be divided'
  ):
    rollouts.open(dataclasses.replace(run, train=rollouts))
  with pytest.raises(Invalid, match=r'Rollouts\.samplers: 2 is not of Samplers'):
    dataclasses.replace(run.train, samplers=2)


def test_a_run_may_go_on_with_other_samplers(text_file):
  run = load(text_file).build()

  def identity(samplers) -> str:
    rollouts = dataclasses.replace(run.train, samplers=samplers)
    return dataclasses.replace(run, train=rollouts).identity()

  assert identity(Samplers()) == identity(OnRay())
  assert identity(Samplers(parts=2)) == identity(OnRay(parts=2, cpus=4)) != identity(Samplers())


@pytest.mark.slow
def test_samplers_on_a_cluster_give_the_rows_of_local_ones(text_file, tmp_path, ray_hosts):
  """With a sampler's host killed in the middle of the run."""
  make_base(text_file, tmp_path)
  run = described(text_file, tmp_path)
  here = trained(run, Samplers(parts=2), tmp_path / 'here')
  killed = []

  def kill_a_host():
    while not (busy := [each for each in ray_hosts.raylets if ray_hosts.busy(each, 'sample')]):
      time.sleep(0.01)
    ray_hosts.kill(busy[0])
    killed.append(busy[0])
    ray_hosts.add()

  killer = threading.Thread(target=kill_a_host, daemon=True)
  killer.start()
  there = trained(run, OnRay(parts=2, address=ray_hosts.address), tmp_path / 'there')
  killer.join(60)
  assert killed
  assert_equal(here, there)
