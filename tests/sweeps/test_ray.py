"""A sweep on a real Ray cluster of three hosts, and what is said of a wrong cluster."""

import dataclasses
import io
import os
import pathlib
import re
import socket
import time

import pytest
from test_chaos import SWEEP, Sweeping

from research.core import configs
from research.core.errors import Invalid, UserError
from research.parallel import ray_tasks
from research.sweeps import dispatch, folder, status
from research.sweeps.launchers import by_name, job, ray
from research.sweeps.launchers.local import Local
from research.sweeps.sweep import make_plan
from research.sweeps.worker import Worker

# Ray leaves files and processes to the garbage collector, and forks while jax has threads (to exec at once).
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore:os.fork:RuntimeWarning',
)
# Four short runs, each with checkpoints.
FOUR = SWEEP.replace('(2e5, 4e5, 6e5)', '(1e5, 2e5)').replace('every=100', 'every=40')


class OnRay(Sweeping):
  """A sweep whose runs a Ray cluster trains."""

  def __init__(self, file, workdir, address: str, **options):
    super().__init__(file, workdir)
    self.launcher = ray.Ray(address=address, **options)
    self.error = None
    self.job = dataclasses.replace(
      self.job, dispatch=lambda: dispatch.Dispatch(self.sweep, self.folder, self.runs)
    )

  def run(self):
    try:
      self.launcher.run(self.job)
    except Exception as error:  # for the test's own thread to look at
      self.error = error


@pytest.fixture
def planned(text_file, tmp_path):
  """A sweep of four runs on the text of the tests, planned and not started."""
  file = tmp_path / 'sweep.gin'
  file.write_text(FOUR.format(files=text_file))
  sweep = configs.load(str(file), root='SWEEP').build()
  _, runs, _ = make_plan(sweep)
  made = folder.Folder(tmp_path / 'sweep')
  made.path.mkdir()
  made.register(runs)
  return sweep, made, runs


@pytest.fixture
def folder_mark(tmp_path):
  return ray_tasks.mark_folder(tmp_path)


@pytest.mark.parametrize(
  ('changed', 'said'),
  [
    ({'module': 'research.nothing'}, r'host H has no research.nothing: it needs the project at'),
    (
      {'module': 'nothing_of_ours'},
      'host H lacks the package nothing_of_ours: install the same lock',
    ),
    (
      {'digest': 'other'},
      'host H has another version of the project, in .*: bring it to that of this',
    ),
    (
      {'mark': '/nowhere/.shared-1'},
      'host H does not see .* as this machine does: choose a folder that all hosts',
    ),
  ],
)
def test_a_host_that_cannot_do_a_task_says_why(changed, said, folder_mark):
  """The very function that Ray carries to a host, called here."""
  place = {
    'root': str(ray_tasks.ROOT), 'digest': ray_tasks.project_digest(str(ray_tasks.ROOT)),
    'module': 'math', 'mark': folder_mark,
  } | changed  # fmt: skip
  marks = (place['mark'],)
  kind, host, value = ray_tasks._entry()(
    place['root'], place['digest'], '', marks, place['module'], 'sqrt', (4,)
  )
  assert re.match(said, ray_tasks._refusal(kind, 'H', value))
  assert host == (socket.gethostname(), '')


def test_a_host_with_all_of_it_answers(folder_mark, monkeypatch):
  monkeypatch.chdir(os.getcwd())  # the task changes it
  root = str(ray_tasks.ROOT)
  call = ray_tasks._entry()
  done = call(root, ray_tasks.project_digest(root), root, (folder_mark,), 'math', 'sqrt', (4,))
  assert done == ('done', (socket.gethostname(), ''), 2.0)


def finish(made: folder.Folder, run) -> None:
  made.run(run).mkdir(parents=True, exist_ok=True)
  (made.run(run) / 'run.json').write_text('{"status": "finished", "loss": 1.0}')


def test_runs_are_given_out_once_and_again_when_they_are_lost(planned, monkeypatch):
  sweep, made, runs = planned
  monkeypatch.setattr(dispatch, 'PAUSE', 0.0)
  gives = dispatch.Dispatch(sweep, made, runs)
  groups = gives.groups(slots=2, most=3)
  names = [name for group in groups for name in group]
  costs = {run.name: run.cost for run in runs}
  assert len(groups) == 3
  assert [costs[name] for name in names] == sorted(costs.values(), reverse=True)[:3]
  finish(made, next(run for run in runs if run.name == names[0]))
  assert [gives.ended(group) for group in groups] == [1, 0, 0]
  again = [name for group in gives.groups(slots=2, most=99) for name in group]
  assert sorted(again) == sorted(set(costs) - {names[0]})
  assert len(gives) == 3


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


class NoCluster:
  """Stands for `ray_tasks.Tasks`: each call ends as `ends` says, at the next look."""

  def __init__(self, made: folder.Folder, runs, ends):
    self.made = made
    self.runs = {run.name: run for run in runs}
    self.ends = ends
    self.pending: list = []
    self.started: list = []

  def slots(self) -> int:
    return 2

  def check_possible(self, patience: float) -> None:
    pass

  def start(self, names, *arguments) -> None:
    self.pending.append(names)
    self.started.append(names)

  def ended(self, seconds: float) -> list[ray_tasks.Outcome]:
    outcomes = [self.ends(self, names) for names in self.pending]
    self.pending.clear()
    return outcomes

  def finish(self, names) -> ray_tasks.Outcome:
    for name in names:
      finish(self.made, self.runs[name])
    return ray_tasks.Outcome(names)


def give_out(planned, ends) -> NoCluster:
  sweep, made, runs = planned
  cluster = NoCluster(made, runs, ends)
  work = job.Job(
    arguments=('--gin_file=x',), workdir=made.path, todo=lambda: 4,
    dispatch=lambda: dispatch.Dispatch(sweep, made, runs),
  )  # fmt: skip
  ray.Ray()._give_out(work, cluster)
  return cluster


def test_what_is_lost_is_given_out_again_until_every_run_is_over(planned, monkeypatch):
  monkeypatch.setattr(dispatch, 'PAUSE', 0.0)

  def ends(cluster, names):
    if cluster.started.count(names) == 1:
      return ray_tasks.Outcome(names, lost='NodeDiedError: its host died')
    return cluster.finish(names)

  cluster = give_out(planned, ends)
  _, made, runs = planned
  assert sorted(cluster.started) == sorted(2 * [(run.name,) for run in runs])
  assert len(made.rows(runs)) == 4
  assert (made.path / 'ray.log').read_text().count('NodeDiedError: its host died') == 4


@pytest.mark.parametrize(
  ('error', 'why'),
  [
    (
      ImportError('no jax here'),
      r'tasks end before they train: ImportError: no jax here \(see .*ray.log',
    ),
    (UserError('host H lacks the package jax'), 'host H lacks the package jax'),
  ],
)
def test_tasks_that_cannot_start_are_not_started_for_ever(error, why, planned, monkeypatch):
  monkeypatch.setattr(dispatch, 'PAUSE', 0.0)
  with pytest.raises(UserError, match=why):
    give_out(planned, lambda cluster, names: ray_tasks.Outcome(names, error=error))


def test_what_is_wrong_with_the_launcher_is_told(monkeypatch):
  with pytest.raises(Invalid, match=r'Ray\.cpus: -1 must not be negative'):
    ray.Ray(cpus=-1)
  with pytest.raises(Invalid, match=r'Ray\.cpus: 0, and nothing else that a task takes'):
    ray.Ray(cpus=0)
  with pytest.raises(UserError, match=r'--address=a:1: Local has no address; give --launcher=ray'):
    by_name.with_address(Local(), 'a:1')
  assert by_name.with_address(by_name.named('ray'), 'a:1').address == 'a:1'


@pytest.mark.slow
def test_a_sweep_goes_from_one_launcher_to_the_other_and_back(
  ray_hosts, text_file, tmp_path, monkeypatch, user_environment
):
  """What a local sweep left is done on the cluster; what the cluster did the next local sweep finds."""
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  file.write_text(FOUR.format(files=text_file))
  started = Sweeping(file, tmp_path / 'sweep')
  first = min(started.runs, key=lambda run: run.cost)
  Worker(started.sweep, started.folder).work([first])
  before = started.folder.row(first)
  sweeping = OnRay(file, tmp_path / 'sweep', ray_hosts.address)
  sweeping.run()
  assert sweeping.error is None
  rows = sweeping.folder.rows(sweeping.runs)
  assert [row['status'] for row in rows] == ['finished'] * 4
  assert before in rows
  again = Sweeping(file, tmp_path / 'sweep')
  again.run()  # nothing is left to do
  assert again.folder.rows(again.runs) == rows


@pytest.mark.slow
def test_hosts_without_what_a_task_takes_are_told(ray_hosts, planned):
  sweep, made, runs = planned
  wants = ray.Ray(address=ray_hosts.address, resources={'TPU': 4}, patience=1.0)
  work = job.Job(
    arguments=('--gin_file=x',), workdir=made.path, todo=lambda: 4,
    dispatch=lambda: dispatch.Dispatch(sweep, made, runs),
  )  # fmt: skip
  with pytest.raises(
    UserError, match=r'can take a task of 1 CPU, 4 TPU: there are 3 CPU, 0 TPU in all'
  ):
    wants.run(work)
  with pytest.raises(UserError, match='can take a task of 1 CPU, 4 TPU'):
    wants.slots()
  assert ray.Ray(address=ray_hosts.address).slots() == 3


@pytest.mark.slow
def test_the_scheduler_costs_less_than_five_milliseconds_a_run(ray_hosts, planned, monkeypatch):
  """Ten thousand runs through Ray whose training is nothing."""
  sweep, made, runs = planned
  n = 10_000
  many = [dataclasses.replace(runs[0], name=f'run-{i}', steps=100 + i) for i in range(n)]
  made = folder.Folder(made.path.parent / 'many')
  made.path.mkdir()
  made.register(many)
  gin_file = made.path.parent / 'sweep.gin'
  table = status.Table(made, stream=io.StringIO())
  work = job.Job(
    arguments=(f'--gin_file={gin_file}', f'--workdir={made.path}', '--worker'), workdir=made.path,
    todo=lambda: len(made.rows(many)), watch=lambda: table(many),
    dispatch=lambda: dispatch.Dispatch(sweep, made, many),
  )  # fmt: skip
  monkeypatch.setattr(ray.Ray, 'FUNCTION', ('tests.raylets', 'finish_group'))
  resident = lambda: int(
    re.search(r'VmRSS:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1]
  )
  before, began, clock = resident(), time.process_time(), time.monotonic()
  assert ray.Ray(address=ray_hosts.address).run(work)
  cost, wall = time.process_time() - began, time.monotonic() - clock
  grown = resident() - before
  print(
    f'{1e3 * cost / n:.2f} ms of this process a run, {1e3 * wall / n:.2f} ms by the clock; {grown} kB'
  )
  assert len(made.rows(many)) == n
  assert cost / n < 5e-3
  assert grown < 100_000  # kB: Ray's client, and ten kB a run, its row among them
