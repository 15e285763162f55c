"""`ray job submit` sends the command of a sweep to a cluster, which needs no more of the sender."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from test_ray import FOUR

from research.sweeps import folder
from tests import raylets

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore:os.fork:RuntimeWarning',
)
ONE = FOUR.replace('(8e3, 16e3)', '(8e3,)').replace('(1e5, 2e5)', '(2e4,)')


def submit(address: str, command: list[str], environment: dict) -> str:
  """What `ray job submit` prints, after the head's agent has started, which takes it some seconds."""
  ray = pathlib.Path(sys.executable).parent / 'ray'
  variables = json.dumps({'env_vars': {'PYTHONPATH': str(ROOT)}})
  line = [
    str(ray),
    'job',
    'submit',
    f'--address={address}',
    f'--runtime-env-json={variables}',
    '--',
  ]
  end = time.monotonic() + 180
  while True:
    done = subprocess.run(
      [*line, *command],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    early = 'No available agent' in done.stdout or 'Failed to connect' in done.stdout
    if not early or time.monotonic() > end:
      return done.stdout
    time.sleep(2)


@pytest.mark.slow
def test_a_submitted_job_trains_the_sweep(text_file, tmp_path, user_environment, monkeypatch):
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  file.write_text(ONE.format(files=text_file))
  workdir = tmp_path / 'sweep'
  command = [sys.executable, '-m', 'research.sweep', f'--gin_file={file}', f'--workdir={workdir}']
  with raylets.started(1, dashboard=True) as hosts:
    # With the address, because Ray may name another cluster of this machine that has been started since.
    here = ['--launcher=ray', f'--address={hosts.address}']
    printed = submit(hosts.jobs, [*command, *here], user_environment)
  # The job itself ends with an error: no law can be fitted to one run.
  assert re.search(r'\[1/1\] fit-16x1-2.00e04: finished, loss', printed), printed
  made = folder.Folder(workdir)
  (row,) = made.rows(made.plan())
  assert row['status'] == 'finished'
