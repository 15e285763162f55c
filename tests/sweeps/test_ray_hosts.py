"""Hosts of a Ray cluster that are killed, and runs that take several hosts each."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from test_chaos import Sweeping
from test_ray import FOUR, OnRay

from research.core.errors import Invalid
from research.parallel import ray_cluster, ray_tasks
from research.parallel.ray_cluster import Needs
from research.sweeps.launchers import ray
from tests import raylets

pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore:os.fork:RuntimeWarning',
)
ONE = FOUR.replace('(8e3, 16e3)', '(8e3,)').replace('(1e5, 2e5)', '(1e5,)')
ONE = ONE.replace('every=40', 'every=10')


@pytest.mark.parametrize(
  ('hosts', 'cpus', 'calls'),
  [
    (1, [1, 1, 1], 3),
    (1, [4], 4),
    (2, [1, 1, 1], 1),
    (2, [1, 1, 1, 1], 2),
    (2, [9], 0),  # not two processes on one host
    (2, [9, 1], 1),
    (2, [3, 2, 1], 3),
    (3, [5, 5, 1, 1], 2),
    (3, [5, 5, 0], 0),
  ],
)
def test_a_call_takes_several_hosts_or_none(hosts, cpus, calls):
  assert Needs(cpus=1, hosts=hosts).slots_on([{'CPU': n} for n in cpus]) == calls


def test_a_slice_is_counted_by_its_first_host():
  needs = Needs(cpus=1, resources={'TPU': 4}, hosts=2, slice='v5litepod-8')
  one = [{'CPU': 9, 'TPU': 4, 'TPU-v5litepod-8-head': 1, 'a': 1}, {'CPU': 9, 'TPU': 4, 'a': 1}]
  assert needs.slots_on(one) == 1
  assert needs.slots_on(one + one) == 2
  assert needs.slots_on([{'CPU': 9, 'TPU': 4}] * 2) == 0  # of another kind


def test_what_is_wrong_with_hosts_is_told():
  with pytest.raises(Invalid, match=r'Ray\.hosts: 0 must be a positive whole number'):
    ray.Ray(hosts=0)
  with pytest.raises(
    Invalid, match=r"Ray\.slice: 'v5litepod-16' goes with the number of its hosts"
  ):
    ray.Ray(slice='v5litepod-16')


def nodes_of_call(address: str, needs: Needs) -> list[str]:
  """The nodes that one call with these needs took."""
  ray_cluster.connect(address, 'test')
  try:
    tasks = ray_tasks.Tasks('tests.raylets', 'nodes_of_call', needs)
    return ray_tasks.do_all(tasks, {0: (dataclasses.asdict(needs),)})[0]
  finally:
    ray_cluster.disconnect()


@pytest.mark.slow
def test_the_hosts_of_a_call_are_different_and_those_of_a_slice_are_its_own(ray_hosts, monkeypatch):
  """Of two slices of two hosts each, and three other hosts. Their resources are as Ray names those of TPUs."""
  nodes = nodes_of_call(ray_hosts.address, Needs(cpus=1, hosts=3))
  assert len(set(nodes)) == 3
  slices: dict[str, set] = {}
  kind = 'TPU-v5litepod-8-head'
  added = []
  for name in ('a-slice', 'b-slice'):
    monkeypatch.setenv('TPU_NAME', name)
    pair = [ray_hosts.add(**{'TPU': 4, name: 1, kind: 1}), ray_hosts.add(**{'TPU': 4, name: 1})]
    slices[name] = {raylet.node_id for raylet in pair}
    added += pair
  needs = Needs(cpus=1, resources={'TPU': 4}, hosts=2, slice='v5litepod-8')
  nodes = nodes_of_call(ray_hosts.address, needs)
  for raylet in added:
    ray_hosts.kill(raylet)
  assert set(nodes) in slices.values()


def train_by_two_processes(config, workdir, environment) -> dict:
  """The row of a run that two processes of this machine train."""
  gin_file = workdir.with_suffix('.gin')
  gin_file.write_text(config.text)
  command = [
    sys.executable,
    '-m',
    'research.train',
    f'--gin_file={gin_file}',
    f'--workdir={workdir}',
  ]
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  command += [f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
  both = [
    subprocess.Popen([*command, f'--process_id={i}'], env=environment, stdout=subprocess.DEVNULL)
    for i in range(2)
  ]
  assert [process.wait(timeout=240) for process in both] == [0, 0]
  return json.loads((workdir / 'run.json').read_text())


def wait_for_hosts_under_way(sweeping: OnRay, hosts: raylets.Hosts, least: int) -> list:
  """The raylets that train, at least so many, when a run has a checkpoint and is not over.

  That of the run's first process is at the front.
  """
  end = time.monotonic() + 240
  while time.monotonic() < end and sweeping.is_alive():
    for run in sweeping.runs:
      lease = sweeping.folder.run(run) / 'lease.json'
      if sweeping.folder.step(run) and not sweeping.folder.row(run) and lease.exists():
        pid = json.loads(lease.read_text() or '{}').get('pid')
        busy = [each for each in hosts.raylets if hosts.busy(each, 'train_')]
        first = [each for each in busy if pid in raylets.descendants(hosts.pid(each))]
        if len(busy) >= least and first:
          return sorted(busy, key=lambda each: each is not first[0])
    time.sleep(0.05)
  raise AssertionError('no run got as far as a checkpoint') from sweeping.error


@pytest.mark.slow
def test_a_sweep_that_loses_a_host_and_gains_another_is_the_local_one(
  ray_hosts, text_file, tmp_path, monkeypatch, user_environment
):
  """The host of a run that has a checkpoint is killed; the run goes on from it on another."""
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  # Long enough to be found under way.
  longer = FOUR.replace('(1e5, 2e5)', '(4e5, 6e5)')
  file.write_text(longer.format(files=text_file))
  sweeping = OnRay(file, tmp_path / 'sweep', ray_hosts.address)
  sweeping.start()
  ray_hosts.kill(wait_for_hosts_under_way(sweeping, ray_hosts, 1)[0])
  ray_hosts.add()
  sweeping.join(timeout=400)
  assert not sweeping.is_alive()
  assert sweeping.error is None
  logs = [(sweeping.folder.run(run) / 'log.txt').read_text() for run in sweeping.runs]
  assert any('resumed from' in log for log in logs)
  local = Sweeping(file, tmp_path / 'local')
  local.run()
  rows, expected = (
    [{k: v for k, v in row.items() if k != 'seconds'} for row in each.folder.rows(each.runs)]
    for each in (sweeping, local)
  )
  assert [row['status'] for row in rows] == ['finished'] * 4
  assert rows == expected


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_run_on_two_hosts_is_that_of_two_processes(
  killed, ray_hosts, text_file, tmp_path, monkeypatch, user_environment
):
  """The host of the first process, or of the second, is killed in the middle of the run."""
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  file.write_text(ONE.format(files=text_file))
  sweeping = OnRay(file, tmp_path / 'sweep', ray_hosts.address, hosts=2)
  sweeping.start()
  ray_hosts.kill(wait_for_hosts_under_way(sweeping, ray_hosts, 2)[killed])
  ray_hosts.add()
  sweeping.join(timeout=400)
  assert not sweeping.is_alive()
  assert sweeping.error is None
  (run,) = sweeping.runs
  assert sweeping.folder.row(run)['status'] == 'finished'
  log = (sweeping.folder.run(run) / 'log.txt').read_text()
  assert '2 cpu device(s)' in log
  assert 'resumed from' in log
  config = sweeping.sweep.config(run)
  alone = train_by_two_processes(config, tmp_path / 'local', user_environment)
  mine = sweeping.folder.row(run)
  assert alone.keys() <= mine.keys()
  assert {k: mine[k] for k in alone if k != 'seconds'} == {
    k: v for k, v in alone.items() if k != 'seconds'
  }
