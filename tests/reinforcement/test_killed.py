"""A run of reinforcement that is killed at any moment ends with the same bits."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.reinforcement.small import saved

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Kills itself as no handler can see, in the second round: where its argument says.
CHILD = """
import os, pathlib, signal, sys
from research.checkpoints.manager import Checkpoints
from research.inference import batch_sampler
from research.reinforcement import sampler
from research.training.record import Record
from tests.reinforcement.small import described, train

text_file, folder, workdir, when = sys.argv[1:]
draw, look, save = batch_sampler.draw_answers, Record.look, Checkpoints.save
draws = []

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def draw_and_die(*arguments, **knobs):
  drawn = draw(*arguments, **knobs)
  draws.append(1)
  if len(draws) == 2:
    die()
  return drawn

def look_and_die(self, step, scalars):
  if step == 6:
    die()
  return look(self, step, scalars)

def save_and_die(self, step, state, meta):
  save(self, step, state, meta)
  if step == 8:
    die()  # it is being written

if when == 'draw':
  sampler.draw_answers = draw_and_die
if when == 'update':
  Record.look = look_and_die
if when == 'save':
  Checkpoints.save = save_and_die
train(described(text_file, pathlib.Path(folder)), pathlib.Path(workdir))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_ends_the_same(text_file, tmp_path, user_environment):
  def start(name, when):
    command = [sys.executable, '-c', CHILD, text_file, tmp_path, tmp_path / name, when]
    return subprocess.run(
      [str(part) for part in command], cwd=ROOT, env=user_environment | {'PYTHONPATH': str(ROOT)},
      capture_output=True, text=True, timeout=900,
    )  # fmt: skip

  base = subprocess.run(
    [sys.executable, '-c', 'import sys, pathlib; from tests.reinforcement.small import make_base; '
     'make_base(sys.argv[1], pathlib.Path(sys.argv[2]))', str(text_file), str(tmp_path)],
    cwd=ROOT, env=user_environment | {'PYTHONPATH': str(ROOT)}, check=True, capture_output=True,
  )  # fmt: skip
  assert base.returncode == 0
  done = start('whole', 'never')
  assert done.returncode == 0, done.stderr
  undisturbed = saved(tmp_path / 'whole')
  for when in ('draw', 'update', 'save'):
    assert start(when, when).returncode == -9
    done = start(when, 'never')
    assert done.returncode == 0, done.stderr
    for name, value in saved(tmp_path / when).items():
      np.testing.assert_array_equal(value, undisturbed[name], err_msg=f'{when}: {name}')
