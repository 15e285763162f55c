"""A sweep on a real Ray cluster of three hosts, one of which is killed; and what is said of a wrong cluster."""

import dataclasses
import json
import os
import socket
import time

import pytest
from test_chaos import SWEEP, Sweeping

from research.core import configs
from research.core.errors import Invalid, UserError
from research.parallel import ray_cluster
from research.sweeps import dispatch, folder
from research.sweeps.launchers import by_name, ray
from research.sweeps.launchers.local import Local
from research.sweeps.sweep import make_plan
from tests import raylets


class OnRay(Sweeping):
  """A sweep whose runs a Ray cluster trains."""

  def __init__(self, file, workdir, address: str):
    super().__init__(file, workdir)
    self.address = address
    self.error = None
    self.job = dataclasses.replace(
      self.job, dispatch=lambda: dispatch.Dispatch(self.sweep, self.folder, self.runs)
    )

  def run(self):
    try:
      ray.Ray(address=self.address).run(self.job)
    except Exception as error:  # for the test's own thread to look at
      self.error = error


@pytest.fixture
def planned(text_file, tmp_path):
  """A sweep of six runs on the text of the tests, planned and not started."""
  file = tmp_path / 'sweep.gin'
  file.write_text(SWEEP.format(files=text_file))
  sweep = configs.load(str(file), root='SWEEP').build()
  _, runs, _ = make_plan(sweep)
  made = folder.Folder(tmp_path / 'sweep')
  made.path.mkdir()
  made.register(runs)
  return sweep, made, runs


def finish(made: folder.Folder, run) -> None:
  made.run(run).mkdir(parents=True, exist_ok=True)
  (made.run(run) / 'run.json').write_text('{"status": "finished", "loss": 1.0}')


def test_runs_are_given_out_once_and_again_when_they_are_lost(planned, monkeypatch):
  sweep, made, runs = planned
  monkeypatch.setattr(dispatch, 'PAUSE', 0.0)
  gives = dispatch.Dispatch(sweep, made, runs)
  groups = gives.groups(slots=2, most=4)
  names = [name for group in groups for name in group]
  costs = {run.name: run.cost for run in runs}
  assert len(groups) == 4
  assert [costs[name] for name in names] == sorted(costs.values(), reverse=True)[:4]
  finish(made, next(run for run in runs if run.name == names[0]))
  assert [gives.ended(group) for group in groups] == [1, 0, 0, 0]
  again = [name for group in gives.groups(slots=2, most=99) for name in group]
  assert sorted(again) == sorted(set(costs) - {names[0]})
  assert len(gives) == 5


def test_a_lost_run_waits_before_it_is_given_out_again(planned):
  gives = dispatch.Dispatch(*planned)
  (group,) = gives.groups(slots=1, most=1)
  gives.ended(group)
  assert group not in gives.groups(slots=1, most=99)


def test_a_group_is_a_population_until_hosts_would_have_no_work(planned):
  sweep, made, runs = planned
  sweep = dataclasses.replace(sweep, population=4)
  alike = [dataclasses.replace(runs[0], name=f'run-{i}') for i in range(12)]
  made = folder.Folder(made.path.parent / 'alike')
  sizes = {
    slots: [len(g) for g in dispatch.Dispatch(sweep, made, alike).groups(slots, 99)]
    for slots in (1, 3, 6, 20)
  }
  assert sizes == {1: [4] * 3, 3: [4] * 3, 6: [2] * 6, 20: [1] * 12}


def test_what_is_wrong_with_the_launcher_is_told(monkeypatch):
  with pytest.raises(Invalid, match=r'Ray\.cpus: -1 must not be negative'):
    ray.Ray(cpus=-1)
  with pytest.raises(Invalid, match=r'Ray\.cpus: 0, and nothing else that a task takes'):
    ray.Ray(cpus=0)
  with pytest.raises(UserError, match=r'--address=a:1: Local has no address; give --launcher=ray'):
    by_name.at(Local(), 'a:1')
  assert by_name.at(by_name.named('ray'), 'a:1').address == 'a:1'


def test_without_the_extra_the_launcher_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'ray', None)
  with pytest.raises(UserError, match=r'--launcher=ray needs Ray: uv sync --extra ray'):
    ray_cluster.connect('127.0.0.1:1', '--launcher=ray')


def test_an_address_where_no_head_answers_is_told():
  pytest.importorskip('ray')
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    port = closed.getsockname()[1]
  with pytest.raises(UserError, match=rf'--address=127.0.0.1:{port}: no Ray head answers there'):
    ray_cluster.connect(f'127.0.0.1:{port}', '--launcher=ray')
  with pytest.raises(UserError, match='give HOST:PORT of the head'):
    ray_cluster.connect('ray://head:10001', '--launcher=ray')


def test_other_versions_of_a_cluster_are_named():
  text = """Version mismatch: The cluster was started with:
    Ray: 2.58.0
    Python: 3.11.7
This process on node 10.0.0.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""
  said = ray_cluster._why_not_joined('--address=head:6379', RuntimeError(text))
  assert 'different versions (Ray 2.58.0 and 2.60.0); install the same Python' in said


@pytest.mark.slow
def test_a_sweep_on_three_hosts_survives_one_and_equals_the_local_one(
  text_file, tmp_path, user_environment, monkeypatch
):
  """Three raylets; one is killed with its runs under way, another joins; then every row is there once."""
  pytest.importorskip('ray')
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  file.write_text(SWEEP.format(files=text_file))
  local = Sweeping(file, tmp_path / 'local')
  local.run()
  with raylets.started(3) as hosts:
    sweeping = OnRay(file, tmp_path / 'ray', hosts.address)
    sweeping.start()
    victim = wait_for_a_run_under_way(sweeping, hosts)
    hosts.kill(victim)
    hosts.add()
    sweeping.join(timeout=500)
    assert not sweeping.is_alive()
    assert sweeping.error is None
  assert sweeping.rows() == local.rows()
  assert len({row['run'] for row in sweeping.rows()}) == len(sweeping.runs) == 6
  resumed = [
    run
    for run in sweeping.runs
    if 'resumed from' in (sweeping.folder.run(run) / 'log.txt').read_text()
  ]
  assert resumed  # the dead host's run went on from its checkpoint
  for run in sweeping.runs:
    curves = [[r['step'] for r in s.folder.curve(run) if 'loss' in r] for s in (local, sweeping)]
    assert curves[0] == curves[1]


def wait_for_a_run_under_way(sweeping: OnRay, hosts: raylets.Hosts):
  """A raylet with a run that has a checkpoint and is not over."""
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and sweeping.error is None:
    for run in sweeping.runs:
      lease = sweeping.folder.run(run) / 'lease.json'
      if sweeping.folder.step(run) and not sweeping.folder.row(run) and lease.exists():
        pid = json.loads(lease.read_text() or '{}').get('pid')
        for raylet in hosts.raylets:
          if pid in hosts.workers(raylet):
            return raylet
    time.sleep(0.1)
  raise AssertionError('no run got as far as a checkpoint') from sweeping.error
