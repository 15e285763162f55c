"""Several processes as one job: how they find each other, and that they train as one would."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib

import numpy as np
import pytest

from research.core import storage
from research.core.errors import UserError
from research.parallel.processes import Cluster, check_platform, find, meet

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


TORCHRUN = {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'h', 'MASTER_PORT': '7'}


@pytest.mark.parametrize(
  ('flags', 'env', 'found'),
  [
    ((), {}, None),
    (('h:1', 2, 0), {}, Cluster('flags', 'h:1', 2, 0)),
    ((None, 1, None), {'WORLD_SIZE': '4'}, None),
    (
      (),
      {'WORLD_SIZE': '4', 'RANK': '3', 'MASTER_ADDR': 'h', 'MASTER_PORT': '7'},
      Cluster('WORLD_SIZE and RANK', 'h:7', 4, 3),
    ),
    ((), {'WORLD_SIZE': '1', 'RANK': '0'}, None),
    (('[::1]:8476', 2, 1), {}, Cluster('flags', '[::1]:8476', 2, 1)),
    ((), {**TORCHRUN, 'MASTER_ADDR': '::1'}, Cluster('WORLD_SIZE and RANK', '[::1]:7', 2, 0)),
    ((), {'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '2'}, Cluster('Slurm')),
    ((), {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, None),
  ],
)
def test_a_cluster_is_found(flags, env, found):
  assert find(*flags, env={'JAX_PLATFORMS': 'cpu', **env}) == found


@pytest.mark.parametrize(
  ('flags', 'env', 'says'),
  [
    (('h:1', 2, None), {}, r'--process_id is missing: a job of several processes needs all of'),
    (('h:1', 2, 2), {}, r'--process_id=2 must be from 0 to 1'),
    (('h', 2, 0), {}, r'--coordinator=h must be host:port'),
    (('h:1', 0, 0), {}, r'--num_processes=0 must be 1 or more'),
    (('h:1', -3, 0), {}, r'--num_processes=-3 must be 1 or more'),
    (('h:1', 2, -1), {}, r'--process_id=-1 must be from 0 to 1'),
    ((':1', 2, 0), {}, r'--coordinator=:1 must be host:port'),
    (('h:', 2, 0), {}, r"--coordinator=h:: the port '' must be a number from 1 to 65535"),
    (('h:http', 2, 0), {}, r"the port 'http' must be a number"),
    (('h:99999', 2, 0), {}, r"the port '99999' must be a number from 1 to 65535"),
    (
      ('http://h:1', 2, 0),
      {},
      r'--coordinator=http://h:1 must be host:port',
    ),
    (('::1:8476', 2, 0), {}, r'--coordinator=::1:8476: write an IPv6 address in brackets'),
    (('[1:2]:8476', 2, 0), {}, r'write an IPv6 address in brackets'),
    ((), {'WORLD_SIZE': 'two'}, r'WORLD_SIZE=two must be a whole number, 1 or more; unset it'),
    ((), {'WORLD_SIZE': '0'}, r'WORLD_SIZE=0 must be a whole number'),
    ((), {'WORLD_SIZE': '-2'}, r'WORLD_SIZE=-2 must be a whole number'),
    ((), {'WORLD_SIZE': '2.0'}, r'WORLD_SIZE=2.0 must be a whole number'),
    ((), {**TORCHRUN, 'RANK': '2'}, r'RANK=2 must be from 0 to 1, for WORLD_SIZE=2'),
    ((), {**TORCHRUN, 'RANK': 'x'}, r'RANK=x must be a whole number, 0 or more'),
    ((), {**TORCHRUN, 'MASTER_PORT': '0'}, r"MASTER_ADDR=h, MASTER_PORT=0: the port '0' must be"),
    ((), {'SLURM_STEP_NUM_TASKS': '4(x2)'}, r'SLURM_STEP_NUM_TASKS=4\(x2\) must be a whole number'),
    ((), {'WORLD_SIZE': '2', 'MASTER_ADDR': 'h', 'RANK': '0'}, r'set without MASTER_PORT'),
  ],
)
def test_half_a_cluster_is_one_sentence(flags, env, says):
  with pytest.raises(UserError, match=says):
    find(*flags, env=env)


def test_an_accelerator_is_not_passed_over(monkeypatch):
  monkeypatch.setattr(os.path, 'exists', lambda path: path == '/dev/nvidia0')
  with pytest.raises(
    UserError, match=r'/dev/nvidia0 and jax found only CPUs: install the cuda extra'
  ):
    check_platform('cpu', {})
  check_platform('cpu', {'JAX_PLATFORMS': 'cpu'})
  check_platform('gpu', {})


def met(cluster, results, timeout=1.0):
  try:
    results[cluster.process] = meet(cluster, timeout)
  except UserError as error:
    results[cluster.process] = str(error)


@pytest.mark.parametrize(('came', 'missing'), [((0, 1, 2), None), ((0, 2), '1'), ((1,), '0')])
@pytest.mark.parametrize('host', ['127.0.0.1', '[::1]'])
def test_who_does_not_come_is_named(came, missing, host):
  if host == '[::1]' and not socket.has_dualstack_ipv6():
    pytest.skip('no IPv6 here')
  address, results = f'{host}:{free_port()}', {}
  processes = [
    threading.Thread(target=met, args=(Cluster('flags', address, 3, i), results, 0.5)) for i in came
  ]
  for process in processes:
    process.start()
  for process in processes:
    process.join()
  said = (
    missing
    and f'process {missing} of 3 did not come to {address} within 0 s (flags): look at its log.'
  )
  assert results == dict.fromkeys(came, said)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Job:
  """`processes` processes of one training run, two fake devices each."""

  def __init__(self, command, processes, folder):
    flags = [f'--coordinator=127.0.0.1:{free_port()}', f'--num_processes={processes}']
    self.logs = [folder / f'log.{i}' for i in range(processes)]
    self.processes = []
    for i, path in enumerate(self.logs):
      own = [*flags, f'--process_id={i}'] if processes > 1 else []
      env = environment(2 if processes > 1 else 4)
      with path.open('w') as log:
        self.processes.append(
          subprocess.Popen(command + own, cwd=ROOT, env=env, stderr=log, stdout=subprocess.DEVNULL)
        )

  def wait(self) -> list[int]:
    try:
      return [process.wait(timeout=240) for process in self.processes]
    finally:
      self.kill()

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()

  def text(self) -> str:
    return '\n'.join(log.read_text() for log in self.logs)


def environment(devices: int) -> dict[str, str]:
  flags = f'--xla_force_host_platform_device_count={devices}'
  return os.environ | {'XLA_FLAGS': flags, 'PJRT_NPROC': '8', 'JAX_PLATFORMS': 'cpu'}


def command(text_file, workdir, mesh, **more):
  bindings = {
    'FILES': f"'{text_file}'",
    'Run.steps': 60,
    'Run.checkpoint_every': 10,
    'Run.log_every': 1,
    **more,
  }
  flags = [f'--gin.{k}={v}' for k, v in bindings.items()]
  files = ['tests/gin/decoder.gin', f'gin/meshes/{mesh}.gin']
  return [
    sys.executable, '-m', 'research.train', *(f'--gin_file={f}' for f in files), *flags,
    f'--workdir={workdir}',
  ]  # fmt: skip


def losses(workdir) -> dict[int, float]:
  return {r['step']: r['loss'] for r in storage.read_rows(workdir / 'metrics.jsonl') if 'loss' in r}


def reach(job, workdir, step):
  """Waits until the job has written a row of this step."""
  end = time.monotonic() + 240
  while max(losses(workdir), default=0) < step:
    assert all(process.poll() is None for process in job.processes), job.text()
    assert time.monotonic() < end, job.text()
    time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_as_one_are_one_run(text_file, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  alone = Job(command(text_file, whole, 'data'), 1, tmp_path)
  assert alone.wait() == [0], alone.text()

  both = Job(command(text_file, parts, 'fsdp'), 2, tmp_path)
  reach(both, parts, 24)
  for process in both.processes:
    process.send_signal(signal.SIGKILL)
  both.kill()
  assert '2 processes, 2 x cpu each (flags)' in both.text()
  assert json.loads((parts / 'metrics.jsonl').read_text().splitlines()[0])['step'] == 1

  again = Job(command(text_file, parts, 'fsdp_tensor'), 1, tmp_path)
  assert again.wait() == [0], again.text()
  assert 'resumed from step' in again.text()
  one, two = losses(whole), losses(parts)
  assert list(one) == list(two) == [*range(1, 61)]
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  row, other = (json.loads((folder / 'run.json').read_text()) for folder in (whole, parts))
  assert row['tokens'] == other['tokens']
  np.testing.assert_allclose(other['loss'], row['loss'], rtol=1e-5)


@pytest.mark.slow
def test_sigterm_in_one_process_saves_all_and_stops_them(text_file, tmp_path):
  more = {'Run.steps': 4000, 'Run.checkpoint_every': None}
  job = Job(command(text_file, tmp_path / 'run', 'fsdp', **more), 2, tmp_path)
  reach(job, tmp_path / 'run', 9)
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait() == [143, 143], job.text()
  saved = [int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir() if p.name.isdigit()]
  assert len(saved) == 1
  assert 9 <= saved[0] < 4000


def test_a_coordinator_without_an_address_is_named():
  with pytest.raises(
    UserError, match=r'did not come to no-such-host\.invalid:1 .*no-such-host\.invalid: '
  ):
    meet(Cluster('flags', 'no-such-host.invalid:1', 2, 1), timeout=-6)


def test_the_extras_that_hints_name_exist():
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  for path in (ROOT / 'research').rglob('*.py'):
    for extra in re.findall(r'--extra[ =](\w+)', path.read_text()):
      assert extra in extras, f'{path.name} names the extra {extra!r}'
