"""Every gin file of the project reads, says what it is, and describes a model that can be made.

What several sizes share (`family.gin` and its like) says in its header what it leaves open: 'Set: EMBED.'
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from research.core import configs
from research.model.counts import abstract
from research.parallel.mesh import Mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'gin').rglob('*.gin'))
TINY = {
  'VOCAB': 96, 'EMBED': 32, 'LAYERS': 2, 'ENCODER_LAYERS': 2, 'DECODER_LAYERS': 1, 'PERIODS': 2, 'REST': 1,
  'DENSE_LAYERS': 1, 'MOE_LAYERS': 2, 'HEADS': 8, 'KV_HEADS': 2, 'HEAD_DIM': 8, 'MLP': 48, 'EXPERT_MLP': 16,
  'SHARED_MLP': 32, 'EXPERTS': 4, 'ACTIVE': 2, 'LOGIT_SCALE': 0.1,
}  # fmt: skip


def left_open(file: str) -> list[str]:
  """The macros that the header of a file tells its reader to set."""
  header = ' '.join(re.findall(r'^# (.*)$', (ROOT / file).read_text(), re.MULTILINE))
  said = re.sub(r'\([^)]*\)', '', header.partition('Set: ')[2])
  return re.findall(r'[A-Z][A-Z_]+', re.split(r'[.;]', said)[0])


SHARED = [file for file in FILES if file.startswith('gin/models/') and left_open(file)]
SIZES = [file for file in FILES if file.startswith('gin/models/') and file not in SHARED]
# tests/tuning/test_tuning_page.py gives this one the model and the files that it needs.
NEEDS_FILES = ('gin/runs/instruct.gin', 'gin/runs/dpo.gin', 'gin/runs/reward.gin')
RUNS = [file for file in FILES if file.startswith('gin/runs/') and file not in NEEDS_FILES]
SWEEPS = [file for file in FILES if file.startswith('gin/sweeps/')]


def models(value):
  """Every partial in a resolved tree that makes a model."""
  if isinstance(value, functools.partial):
    if hasattr(value.func, 'features') and hasattr(value.func, 'logits'):
      yield value
    value = value.keywords
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list | tuple):
    for v in value:
      yield from models(v)


@pytest.mark.parametrize('file', FILES)
def test_reads_and_says_what_it_is_first(file):
  configs.load(file)  # grammar, imports, names of classes and arguments
  first = (ROOT / file).read_text().splitlines()[0]
  assert re.match(r'# \w.{10,}', first), f'{file} does not start with a line that says what it is'


@pytest.mark.parametrize('file', SIZES)
def test_size_is_complete(file):
  """tests/model/test_counts.py makes the shapes of every one of them."""
  assert list(models(configs.load(file, root='MODEL').tree()))


@pytest.mark.parametrize('file', SHARED)
def test_shared_file_needs_what_it_says_and_no_more(file):
  bindings = [f'{name}={TINY[name]}' for name in left_open(file)]
  module = abstract(configs.load(file, bindings, root='MODEL').tree())  # a name unused is an error
  batch = {f'{name}_input_tokens': jnp.ones((2, 12), jnp.int32) for name in module.inputs}
  with Mesh(data=1).use(jax.devices()[:1]):
    logits, penalties = jax.eval_shape(lambda module, batch: module(batch), module, batch)
  assert logits.shape == (2, 12, module.vocab)
  assert logits.dtype == jnp.float32
  assert all(penalty.shape == () for penalty in penalties.values())


@pytest.mark.parametrize('file', RUNS)
def test_model_of_a_run_can_be_made(file):
  (model,) = models(configs.load(file).tree())
  abstract(model)


@pytest.mark.parametrize('file', SWEEPS)
def test_sweep_is_of_a_run(file):
  sweep = configs.load(file, root='SWEEP').build()
  assert sweep.run in RUNS
  (model,) = models(configs.load(sweep.run, sweep.bindings).tree())
  abstract(model)
