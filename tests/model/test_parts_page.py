"""The recipe of docs/parts.md, in a folder of its own, as its reader would follow it."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.model.part import Context
from research.parallel.mesh import Mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / 'docs' / 'parts.md').read_text()
RG_LRU, PRUNED = re.findall(r'```python\n(.*?)```', PAGE, flags=re.DOTALL)
HAWK, LINE = re.findall(r'```gin\n(.*?)```', PAGE, flags=re.DOTALL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Where a user keeps what is theirs, outside of the project."""
  folder = tmp_path_factory.mktemp('own')
  (folder / 'mixers').mkdir()
  (folder / 'mixers' / 'rg_lru.py').write_text(RG_LRU)
  (folder / 'mixers' / 'hawk.gin').write_text(HAWK)
  (folder / 'pruned.py').write_text(PRUNED)
  return folder


def python(folder, *arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'PYTHONPATH': f'{folder}{os.pathsep}{ROOT}'}
  command = [sys.executable, '-m', *arguments]
  return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


def defined(code: str) -> dict:
  names = {'__name__': 'recipe'}
  exec(code, names)
  return names


def test_the_mixer_is_the_papers_recurrence_and_forgets_at_a_documents_start():
  part, length = defined(RG_LRU)['RgLru'], 9
  x = np.random.default_rng(0).normal(size=(1, length, 4)).astype(np.float32)
  segments = np.where(np.arange(length) < 5, 1, 2)[None].astype(np.int32)
  with Mesh().use(jax.devices()[:1]):
    module = part(4, inner=3, rngs=nnx.Rngs(0))
    y, _ = module(jnp.asarray(x), Context(positions=segments, segments=segments))
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(module)))
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  h, want = np.zeros(3), []
  for t in range(length):
    r = sigmoid(x[0, t] @ p['keep_gate']['kernel'])
    i = sigmoid(x[0, t] @ p['input_gate']['kernel'])
    a = sigmoid(p['decay']) ** (8 * r)
    drive = np.sqrt(1 - a**2) * i * (x[0, t] @ p['input']['kernel'])
    h = drive if t == 5 else a * h + drive
    want.append(h @ p['output']['kernel'])
  np.testing.assert_allclose(y[0], want, atol=1e-5)


def test_its_model_is_counted_from_outside_of_the_project(folder):
  done = python(folder, 'research.count', '--gin_file=mixers/hawk.gin', '--length=256')
  assert done.returncode == 0, done.stderr
  rows = dict(re.findall(r'^(\w+) +([\d,]+)', done.stdout, flags=re.MULTILINE))
  mixing = 3 * 3 * 80 * 2  # forward and backward, FLOPs of a token and channel, channels, layers
  full, plain = (rows[name] for name in ('flops_attention_full', 'flops_6n_with_head'))
  assert int(full.replace(',', '')) - int(plain.replace(',', '')) == mixing


@pytest.mark.slow
def test_it_is_held_to_what_every_model_is_held_to(folder):
  tests = str(ROOT / 'tests' / 'model' / 'test_model.py')
  model = f'--model={folder}/mixers/hawk.gin'
  done = python(folder, 'pytest', tests, model, f'--rootdir={ROOT}', '-n0', '-q')
  assert done.returncode == 0, done.stdout
  assert done.stdout.splitlines()[0].count('.') >= 7  # tests that passed


@pytest.mark.slow
def test_a_line_of_gin_makes_every_matrix_of_the_kind_of_the_page(folder):
  (folder / 'pruned.gin').write_text(
    'from __gin__ import dynamic_registration\nimport pruned\nfrom research.model import models\n'
    f"include 'gin/models/mixtral/family.gin'\n{LINE}"
  )
  sizes = ('EMBED=16', 'LAYERS=2', 'HEADS=2', 'KV_HEADS=2', 'HEAD_DIM=8', 'MLP=16', 'VOCAB=64')
  flags = [f'--gin.{size}' for size in sizes]
  plain = python(folder, 'research.count', '--gin_file=gin/models/mixtral/8x7b.gin', *flags)
  ours = python(folder, 'research.count', '--gin_file=pruned.gin', *flags)
  assert ours.returncode == 0, ours.stderr
  assert ours.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:]
