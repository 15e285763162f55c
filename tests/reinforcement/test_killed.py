"""A run of reinforcement learning that is killed at any moment ends with the same bits after a restart."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.reinforcement.small import make_base, saved

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Kills itself in the second round, at the moment that its argument names. No handler can catch the signal.
CHILD = """
import os, pathlib, signal, sys
from research.checkpoints.manager import Checkpoints
from research.inference import batch_sampler
from research.reinforcement import sampler
from research.training.record import Record
from tests.reinforcement.small import described, train

text_file, folder, workdir, when = sys.argv[1:]
draw = batch_sampler.draw_answers
log_step = Record.log_step
save = Checkpoints.save
draws = []

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def draw_and_die(*arguments, **knobs):
  drawn = draw(*arguments, **knobs)
  draws.append(1)
  if len(draws) == 2:
    die()
  return drawn

def log_and_die(self, step, scalars):
  if step == 6:
    die()
  return log_step(self, step, scalars)

def save_and_die(self, step, state, meta):
  save(self, step, state, meta)
  if step == 8:
    die()  # it is being written

if when == 'draw':
  sampler.draw_answers = draw_and_die
if when == 'update':
  Record.log_step = log_and_die
if when == 'save':
  Checkpoints.save = save_and_die
train(described(text_file, pathlib.Path(folder)), pathlib.Path(workdir))
"""


def start(text_file, folder, name, when, environment):
  """A process that trains `folder`/`name`."""
  command = [sys.executable, '-c', CHILD, text_file, folder, folder / name, when]
  return subprocess.run(
    [str(part) for part in command], cwd=ROOT, env=environment | {'PYTHONPATH': str(ROOT)},
    capture_output=True, text=True,
  )  # fmt: skip


@pytest.fixture(scope='module')
def whole(text_file, tmp_path_factory, user_environment):
  """The folder of a base model and of a run that nothing interrupted."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    make_base(text_file, folder)
  done = start(text_file, folder, 'whole', 'never', user_environment)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('when', ['draw', 'update', 'save'])
def test_a_run_that_was_killed_ends_the_same(text_file, whole, user_environment, when):
  assert start(text_file, whole, when, when, user_environment).returncode == -9
  done = start(text_file, whole, when, 'never', user_environment)
  assert done.returncode == 0, done.stderr
  undisturbed = saved(whole / 'whole')
  for name, value in saved(whole / when).items():
    np.testing.assert_array_equal(value, undisturbed[name], err_msg=name)
