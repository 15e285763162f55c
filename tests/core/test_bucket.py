"""Runs and sweeps whose workdir is a bucket, against a server of our own."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from bucket import Bucket

from research.checkpoints import folders
from research.core import storage

pytest.importorskip('gcsfs')
ROOT = storage.pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope='module')
def bucket():
  with Bucket('shelf') as bucket:
    yield bucket


@pytest.fixture(scope='module')
def environment(bucket, user_environment, text_file):
  return {**user_environment, **bucket.environment, 'ISOFLOP_CACHE': os.environ['ISOFLOP_CACHE']}


@pytest.fixture
def stack():
  with contextlib.ExitStack() as stack:
    yield stack


def command(text_file, workdir, *more) -> list[str]:
  run = ['--gin_file=tests/gin/decoder.gin', f'--gin.FILES="{text_file}"', '--gin.LAYERS=1']
  run.append('--gin.Run.checkpoint_every=6')  # of rows every 3 steps: a row's mean is not cut
  return [sys.executable, '-m', 'research.train', *run, f'--workdir={workdir}', *more]


def losses(bucket, prefix: str) -> dict[int, float]:
  rows = [json.loads(line) for line in bucket.cat(f'{prefix}/metrics.jsonl').splitlines()]
  assert [row['step'] for row in rows] == sorted(row['step'] for row in rows)
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, environment, text_file, tmp_path, stack):
  log = stack.enter_context((tmp_path / 'log').open('a'))
  start = lambda workdir: subprocess.Popen(
    command(text_file, workdir), cwd=ROOT, env=environment, stdout=log, stderr=log
  )
  assert start(tmp_path / 'folder').wait() == 0
  killed = start('gs://shelf/runs/a')
  saved = lambda: 'runs/a/checkpoints/6/' + folders.COMMITTED in bucket.names()
  while killed.poll() is None and not saved():
    time.sleep(0.1)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  again = start('gs://shelf/runs/a').wait()
  assert again == 0, (tmp_path / 'log').read_text()
  assert 'resumed from step' in (tmp_path / 'log').read_text()
  row, other = json.loads(bucket.cat('runs/a/run.json')), tmp_path / 'folder' / 'run.json'
  assert row['status'] == 'finished'
  assert row['loss'] == json.loads(other.read_text())['loss']  # to the bit
  alone = storage.read_rows(tmp_path / 'folder' / 'metrics.jsonl')
  assert losses(bucket, 'runs/a') == {r['step']: r['loss'] for r in alone if 'loss' in r}
  # Another run is refused here as in a folder.
  wrong = subprocess.run(
    command(text_file, 'gs://shelf/runs/a', '--gin.Run.seed=7'),
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert wrong.returncode == 2
  assert 'gs://shelf/runs/a holds a different run ("seed = 0" there' in wrong.stderr


def test_what_cannot_be_written_is_one_sentence(bucket, monkeypatch):
  for name, value in bucket.environment.items():
    monkeypatch.setenv(name, value)
  import gcsfs

  gcsfs.GCSFileSystem.clear_instance_cache()
  with pytest.raises(
    storage.UserError, match=r'^--workdir=gs://other/x cannot be written \(.*bucket'
  ):
    storage.make(storage.place('gs://other/x'))
  monkeypatch.setattr(bucket, 'read_only', True)
  with pytest.raises(
    storage.UserError, match=r'gs://shelf/x cannot be written \(.*(create|Forbidden)'
  ):
    storage.make(storage.place('gs://shelf/x'))
  with pytest.raises(storage.UserError, match=r'ftp://x/y: a URL of gs:// or s3:// is wanted'):
    storage.place('ftp://x/y')


SWEEP = """
from __gin__ import dynamic_registration
from research.sweeps import sweep
from research.designs import plan
from research.designs import ablation
include 'tests/gin/workers.gin'
sweep.Sweep:
  design = @ablation.Ablation()
  bindings = ("FILES='{files}'",)
ablation.Ablation:
  params = (1e4,)
  ratio = 0.5
  min_steps = 10
  axes = (('', 'Run.clip=None'), ('', 'CrossEntropy.z_loss=1e-4'))
  ladder = @plan.Ladder()
  learning_rate = @learning_rate/plan.Rule()
  batch_size = @batch_size/plan.Rule()
plan.Ladder.widths = (16, 16, 8)
"""


@pytest.mark.slow
def test_two_workers_do_a_sweep_in_a_bucket(bucket, environment, text_file, tmp_path):
  (tmp_path / 'sweep.gin').write_text(SWEEP.format(files=text_file))
  python = [sys.executable, '-m', 'research.sweep', f'--gin_file={tmp_path / "sweep.gin"}']
  python.append('--workdir=gs://shelf/sweeps/clip')
  go = lambda *more: subprocess.run(
    [*python, *more], cwd=tmp_path, env={**environment, 'PYTHONPATH': str(ROOT)}, text=True,
    capture_output=True,
  )  # fmt: skip
  done = go()
  assert done.returncode == 0, done.stderr
  rows = list(csv.DictReader(bucket.cat('sweeps/clip/results.csv').splitlines()))
  assert [row['status'] for row in rows] == ['finished'] * 4
  assert 'Run.clip=None CrossEntropy.z_loss=1e-4: ' in bucket.cat('sweeps/clip/summary.txt')
  assert bucket.cat('sweeps/clip/report.html').count('<img ') == 2
  assert len(bucket.names('sweeps/clip/workers/')) == 2
  assert not [name for name in bucket.names('sweeps/clip') if name.endswith('lease.json')]
  assert [path.name for path in (tmp_path / 'runs' / 'clip').iterdir()] == ['workers.log']
  told = go('--status')
  assert '4 finished' in told.stdout, told.stderr
