"""Schedules, masks, rows of metrics."""

import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import text
from research.core.errors import Invalid, UserError
from research.training import metrics, optimizers, schedules


def values(schedule, steps):
  return np.array([float(schedule(s)) for s in range(steps + 1)])


def test_warmup_cosine():
  lr = values(schedules.warmup_cosine(100, peak=2.0, warmup=0.1, final_fraction=0.1), 100)
  np.testing.assert_allclose(lr[:11], np.linspace(0, 2, 11), rtol=1e-6)
  np.testing.assert_allclose(lr[55], 2 * (0.1 + 0.9 * 0.5), rtol=1e-6)  # half way down the cosine
  np.testing.assert_allclose(lr[100], 0.2, rtol=1e-6)


def test_warmup_stable_decay():
  lr = values(schedules.warmup_stable_decay(100, peak=2.0, warmup=10, decay=0.2), 100)
  np.testing.assert_allclose(lr[10:81], 2.0)
  np.testing.assert_allclose(lr[80:], np.linspace(2, 0, 21), atol=1e-6)


def test_inverse_square_root():
  lr = values(schedules.inverse_square_root(400, peak=0.5, warmup=100), 400)
  np.testing.assert_allclose(lr[:100], 0.5)
  for step in (150, 399):
    np.testing.assert_allclose(lr[step], 0.5 * math.sqrt(100 / (step + 1)), rtol=1e-6)


def test_constant():
  lr = values(schedules.constant(50, peak=1.5, warmup=5), 50)
  np.testing.assert_allclose(lr[5:], 1.5)
  assert lr[0] == 0


@pytest.mark.parametrize(
  'name', ['warmup_cosine', 'warmup_stable_decay', 'inverse_square_root', 'constant']
)
def test_a_warmup_longer_than_the_run_is_refused(name):
  with pytest.raises(Invalid, match=f'{name}.warmup: 99 of a run of 40 steps'):
    getattr(schedules, name)(40, peak=1.0, warmup=99)


def test_only_matrices_decay():
  kinds = {'norm': {'scale': 'vector'}, 'linear': {'kernel': 'matrix', 'bias': 'vector'}}
  params = jax.tree.map(lambda _: jnp.ones((2, 4)), kinds)
  decay = optax.add_decayed_weights(0.5, optimizers.matrices)
  decay = optimizers.knowing(kinds, decay)
  gradient = jax.tree.map(jnp.zeros_like, params)
  updates, _ = decay.update(gradient, decay.init(params), params)
  moved = jax.tree.map(lambda x: float(jnp.max(x)), updates)
  assert moved == {'norm': {'scale': 0.0}, 'linear': {'kernel': 0.5, 'bias': 0.0}}


def test_kinds_are_known_only_within_the_optimizer_of_a_run():
  with pytest.raises(UserError, match=r'optimizers\.knowing'):
    optimizers.matrices({'kernel': jnp.ones(2)})


def test_rows_have_no_gap_and_no_double_after_resuming(tmp_path):
  rows = metrics.Rows(tmp_path, 0, tensorboard=False)
  for step in (10, 20, 30):
    rows.write({'step': step, 'loss': 1.0})
  rows.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "lo')  # a kill in the middle of a line
  rows = metrics.Rows(tmp_path, 20, tensorboard=False)
  rows.write({'step': 30, 'loss': 2.0})
  rows.close()
  found = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(r['step'], r['loss']) for r in found] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_events_that_cannot_be_written_are_a_sentence_before_the_first_step(tmp_path, monkeypatch):
  (tmp_path / 'tensorboard').write_text('a file where a folder is wanted')
  with pytest.raises(UserError, match=r'tensorboard cannot be written \(File exists\)'):
    metrics.Rows(tmp_path, 0)
  (tmp_path / 'tensorboard').unlink()
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'tensorboardX, which cannot be imported \(it is not'):
    metrics.Rows(tmp_path, 0)


def test_writing_events_imports_no_torch_and_no_buckets(tmp_path):
  # In a process of its own: other tests import torch.
  program = f"""
import pathlib, sys
from research.training import metrics
rows = metrics.Rows(pathlib.Path({str(tmp_path)!r}), 0)
rows.write({{'step': 1, 'loss': 2.0}})
rows.close()
print([name for name in metrics._NOT_NEEDED if name in sys.modules])
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout == '[]\n'
  assert list((tmp_path / 'tensorboard').iterdir())


def test_numbers_a_person_reads():
  assert [text.si(x) for x in (0.5, 999, 1234567, 6.4e12)] == ['0.5', '999', '1.23M', '6.4T']
  assert [text.clock(x) for x in (5, 65, 3723)] == ['0:05', '1:05', '1:02:03']


def test_progress_off_a_terminal_is_plain_lines():
  stream = io.StringIO()
  progress = metrics.Progress(100, 0, 6e6, stream)
  row = {'step': 50, 'loss': 2.5, 'tokens_per_second': 2000.0}
  progress.show(row)
  progress.show(row)  # within the interval: said once
  line = stream.getvalue()
  assert line.count('\n') == 1
  assert line.startswith('step 50/100  loss 2.5000  2k tokens/s  12 GFLOP/s')
