"""Launchers only start workers: processes here, a real Slurm, commands for others."""

import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import slurm
from test_chaos import SWEEP, Sweeping

from research.core import cli
from research.core.errors import Invalid, UserError
from research.sweeps.launchers import by_name, cloud, local
from research.sweeps.launchers.job import Job
from research.sweeps.launchers.slurm import Slurm

JOB = Job(
  arguments=(
    '--gin_file=gin/sweeps/quickstart.gin', "--gin.Sweep.question='Why?'", '--workdir=gs://b/q', '--worker',
  ),
  workdir=pathlib.Path('q'),
  todo=lambda: 5,
)  # fmt: skip


SLURM = """
from research.sweeps.launchers import slurm
sweep.Sweep.launcher = @slurm.Slurm()
slurm.Slurm.parameters = {'cpus_per_task': 1}
"""


def commands(text: str) -> list[list[str]]:
  return [shlex.split(line) for line in text.splitlines() if line and not line.startswith('#')]


def worker_flags(command: str):
  """The flags of a host's command, parsed as research.sweep parses them."""
  _, _, arguments = command.partition('python -m research.sweep ')
  parser = cli.parser('sweep', '')
  for flag in ('--workdir', '--peers'):
    parser.add_argument(flag)
  parser.add_argument('--worker', action='store_true')
  return cli.parse(parser, shlex.split(arguments))


def check_worker(command: str, peers: int):
  flags = worker_flags(command)
  assert flags.worker
  assert (flags.workdir, flags.peers) == ('gs://b/q', str(peers))
  assert (flags.gin_file, flags.gin) == (['gin/sweeps/quickstart.gin'], ["Sweep.question='Why?'"])


def flag(command: list[str], name: str) -> str:
  (value,) = [word.partition('=')[2] for word in command if word.startswith(f'--{name}=')]
  return value


def test_gcloud_queued_resources(capsys):
  launcher = cloud.Gcloud(
    workers=2, accelerator='v6e-8', zone='us-east5-b', repository='https://git/x'
  )
  assert launcher.run(JOB) is False
  create, create2, ssh, _, delete, _ = commands(capsys.readouterr().out)
  assert create[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'isoflop-0']
  assert create2[5] == 'isoflop-1'
  assert (flag(create, 'accelerator-type'), flag(create, 'zone')) == ('v6e-8', 'us-east5-b')
  assert flag(create, 'node-id') == ssh[5] == delete[5] == 'isoflop-0'
  assert ssh[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh']
  assert 'git clone https://git/x isoflop' in flag(ssh, 'command')
  check_worker(flag(ssh, 'command'), peers=2)


def test_xpk_workloads(capsys):
  cloud.Xpk(workers=3, accelerator='v5p-8').run(JOB)
  made = commands(capsys.readouterr().out)
  assert len(made) == 3
  assert all(command[:3] == ['xpk', 'workload', 'create'] for command in made)
  assert len({flag(command, 'workload') for command in made}) == 3
  assert flag(made[0], 'tpu-type') == 'v5p-8'
  check_worker(flag(made[0], 'command'), peers=3)


def test_a_skypilot_task(capsys):
  yaml = pytest.importorskip('yaml')
  cloud.SkyPilot(workers=2).run(JOB)
  text = capsys.readouterr().out
  task = yaml.safe_load(text)
  assert task['resources'] == {
    'accelerators': 'tpu-v5litepod-8', 'zone': 'us-central1-a', 'use_spot': True, 'job_recovery': 'failover'
  }  # fmt: skip
  check_worker(task['run'].strip(), peers=2)
  assert 'sky jobs launch' in text


def test_what_is_wrong_with_a_launcher_is_told():
  with pytest.raises(UserError, match=r'--launcher=slrum: no such launcher. Did you mean slurm\?'):
    by_name.named('slrum')
  with pytest.raises(Invalid, match=r'Local\.workers: 0 must be positive'):
    local.Local(workers=0)


def test_a_sweep_asks_for_its_launcher_before_it_plans(tmp_path):
  command = [sys.executable, '-m', 'research.sweep', '--gin_file=gin/sweeps/quickstart.gin']
  command += [f'--workdir={tmp_path / "sweep"}', '--launcher=slrum', '--plan']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (2, '')
  assert 'no such launcher. Did you mean slurm?' in done.stderr
  assert not (tmp_path / 'sweep').exists()


def test_workers_that_cannot_start_are_not_started_for_ever(tmp_path):
  started = tmp_path / 'started'
  started.write_text('')

  class Broken(local.Local):
    @staticmethod
    def start(job, cores, peers):
      started.write_text(started.read_text() + 'x')
      return subprocess.Popen([sys.executable, '-c', 'raise SystemExit(2)'])

  job = dataclasses.replace(JOB, workdir=tmp_path)
  with pytest.raises(UserError, match=r'died 4 times before it took a run; see .*workers\.log'):
    Broken(workers=1).run(job)
  assert started.read_text() == 'xxxx'


@pytest.mark.parametrize(
  ('at_once', 'shares'), [(1, [[0, 1, 2]]), (2, [[0, 2], [1]]), (9, [[0], [1], [2]])]
)
def test_workers_share_the_cores(at_once, shares, tmp_path, monkeypatch):
  started = []

  class Noting(local.Local):
    @staticmethod
    def start(job, cores, peers):
      started.append((cores, peers))
      return subprocess.Popen([sys.executable, '-c', ''])

  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2})
  todo = lambda: 0 if started else 9
  job = dataclasses.replace(JOB, workdir=tmp_path, todo=todo, at_once=lambda: at_once)
  assert Noting().run(job)
  assert started == [(cores, len(shares)) for cores in shares]


def test_a_hung_worker_is_killed(tmp_path):
  """It is stopped: it neither works nor dies of SIGTERM."""
  workers, over = [], []

  class Hanging(local.Local):
    @staticmethod
    def start(job, cores, peers):
      code = 'import time; time.sleep(60)' if not workers else ''
      workers.append(subprocess.Popen([sys.executable, '-c', code]))
      if len(workers) == 1:
        workers[0].send_signal(signal.SIGSTOP)
      return workers[-1]

  def todo():
    if len(workers) == 2 and workers[1].poll() is not None:
      over.append(True)
    return 0 if over else 1

  job = dataclasses.replace(JOB, workdir=tmp_path, todo=todo, hung=lambda: {workers[0].pid})
  assert Hanging(workers=1).run(job)
  assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  pytest.importorskip('submitit')
  (tmp_path / 'slurm').mkdir()
  try:
    with slurm.started(tmp_path / 'slurm') as environment:
      for name in ('SLURM_CONF', 'PATH', 'LD_LIBRARY_PATH'):
        monkeypatch.setenv(name, environment[name])
      yield environment
  except slurm.Unavailable as why:
    pytest.skip(f'no Slurm: {why}')


@pytest.mark.slow
def test_slurm_runs_a_sweep_and_a_preempted_run_is_finished_from_its_checkpoint(
  cluster, text_file, tmp_path, user_environment, monkeypatch
):
  for name in ('XLA_FLAGS', 'PJRT_NPROC'):
    monkeypatch.delenv(name, raising=False)
  file = tmp_path / 'sweep.gin'
  text = SWEEP.format(files=text_file).replace('(2e5, 4e5, 6e5)', '(1e6, 1.2e6)')
  file.write_text(text + SLURM)
  sweeping, jobs = Sweeping(file, tmp_path / 'sweep'), []
  submit = Slurm.submit

  def noted(self, job):
    jobs.append(submit(self, job))
    return jobs[-1]

  monkeypatch.setattr(Slurm, 'submit', noted)
  sweeping.start()
  running, deadline = None, time.monotonic() + 240
  while (running is None or not jobs) and time.monotonic() < deadline:
    time.sleep(0.2)
    running = next(
      (r for r in sweeping.runs if sweeping.folder.step(r) and not sweeping.folder.row(r)), None
    )
  assert running is not None, (tmp_path / 'sweep' / 'slurm').exists()
  owner = re.search(r':(\d+):', sweeping_lease(sweeping, running).owner)[1]
  job = next(job for job in jobs[0] if job_of(owner) == job.job_id)
  job._interrupt(timeout=False)  # as Slurm does when a job is preempted
  sweeping.join(timeout=400)
  assert not sweeping.is_alive()
  assert [row['status'] for row in sweeping.rows()] == ['finished'] * len(sweeping.runs)
  log = (sweeping.folder.run(running) / 'log.txt').read_text()
  step = int(re.search(r'resumed from step ([\d,]+)', log)[1].replace(',', ''))
  assert 0 < step < running.steps
  steps = [row['step'] for row in sweeping.folder.curve(running) if 'loss' in row]
  assert steps == [*range(3, running.steps, 3), running.steps]
  said = ''.join(path.read_text() for path in (tmp_path / 'sweep' / 'slurm').glob('*.err'))
  assert f'stopped at step {step:,} with a checkpoint' in said


def sweeping_lease(sweeping, run):
  from research.sweeps import leases

  return leases.Leases(sweeping.folder.path / 'runs').read(run.name)


def job_of(pid: str) -> str:
  """The Slurm job of a process."""
  environment = pathlib.Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
  (job,) = [v.partition(b'=')[2] for v in environment if v.startswith(b'SLURM_JOB_ID=')]
  return os.fsdecode(job)
