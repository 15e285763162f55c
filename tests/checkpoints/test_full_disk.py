"""A disk that fills while a checkpoint is written: one sentence, and what was saved before is kept."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

PROGRAM = """
import pathlib, resource, signal, sys
from research.core import cli

def main():
  import jax, numpy as np
  from research.checkpoints.manager import Checkpoints
  checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
  checkpoints.save(1, {'params': {'w': np.arange(8.0)}}, {})
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond this
  values = np.random.default_rng(0).standard_normal(100_000)  # which do not compress
  checkpoints.save(2, {'params': {'w': values, 'v': values + 1}}, {})
  checkpoints.close()

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.run(main)
"""


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_kept(tmp_path):
  folder = tmp_path / 'checkpoints'
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', PROGRAM, str(folder)]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  assert done.stderr == (
    f'error: {folder}: the disk has no room for a checkpoint, and the one of step 1 is kept; free some '
    'space, and start the same command again to continue.\n'
  )
  assert [path.name for path in folder.iterdir()] == ['1']
