"""Kinds of parameters: what decays, what muP slows down, over every preset (shapes alone)."""

import pathlib

import jax
import pytest
from flax import nnx

from research.core import configs
from research.core.errors import UserError
from research.model import counts, parameters
from research.parallel.mesh import Mesh
from tests.families import tiny

GIN = pathlib.Path(__file__).resolve().parent.parent.parent / 'gin' / 'models'

# By the last names of the paths, written down apart from the code: kernels and experts multiply tokens.
MATRICES = ('kernel', 'position')
TABLES = ('tokens', 'positions', 'types', 'table')
VECTORS = (
  'scale', 'bias', 'log_a', 'd', 'step_bias', 'norm_scale', 'content_bias', 'position_bias',
  'shared_gate',
)  # fmt: skip


def expected(path: tuple) -> str:
  if 'experts' in path and ('inputs' in path or path[-1] == 'output'):
    return 'matrix'
  names = {'matrix': MATRICES, 'table': TABLES, 'vector': VECTORS}
  return next(kind for kind, known in names.items() if path[-1] in known)


FAST = (
  'bert/base', 'bloom/560m', 'chinchilla/70b', 'deepseek/v3', 'jamba/52b', 'llama/7b', 'mamba/130m',
  'mamba2/130m', 'qwen2/57b_a14b', 't5/1_0_small',
)  # fmt: skip


def presets():
  """Every preset: some now, the others with the slow tests."""
  paths = (p for p in GIN.rglob('*.gin') if 'Set: ' not in p.read_text())
  names = sorted(str(path.relative_to(GIN).with_suffix('')) for path in paths)
  slow = [name for name in names if name not in FAST]
  return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]


@pytest.mark.parametrize('preset', presets())
def test_every_parameter_has_the_kind_of_what_it_does(preset):
  module = counts.abstract(configs.load(str(GIN / f'{preset}.gin'), root='MODEL').tree())
  found = {path: value.kind for path, value in parameters.all_parameters(module)}
  assert found == {path: expected(path) for path in found}
  nested = parameters.kinds(module)
  assert jax.tree.structure(nested) == jax.tree.structure(nnx.to_pure_dict(nnx.state(module)))


def test_an_unknown_kind_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"no kind of parameter 'matrx'\. Did you mean matrix\?"):
    parameters.param(nnx.Rngs(0), (2,), (None,), parameters.normal, kind='matrx')


@pytest.mark.parametrize('family', ['llama', 't5', 'mixtral', 'mamba2', 'bert'])
def test_a_model_of_shapes_is_that_of_its_arrays(family):
  model = tiny(family)

  def make(key):
    return model(rngs=nnx.Rngs(params=key))

  with Mesh(tensor=2, data=4).use():
    expected = jax.tree.leaves_with_path(jax.eval_shape(make, jax.random.key(0)))
    got = jax.tree.leaves_with_path(parameters.abstract_model(model))
  assert got == expected  # shapes, dtypes and shardings
