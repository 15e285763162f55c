"""One line of gin changes what every matrix of a model is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.model import counts, parameters, weights
from research.parallel.mesh import Mesh
from tests.families import PRESETS, tiny


class Kept(weights.Weight):
  """A matrix kept as its half and read as twice that: in floating point exactly the matrix itself."""

  def __init__(self, matrix: weights.Matrix, *, rngs: nnx.Rngs):
    super().__init__(matrix)
    half = lambda *args, **options: matrix.init(*args, **options) / 2
    self.base = parameters.param(
      rngs, matrix.shape, matrix.axes, half, kind=matrix.kind, active=matrix.active
    )

  def __getitem__(self, index) -> jax.Array:
    return 2 * self.base[index]


def with_weight(family: str, weight):
  return functools.partial(tiny(family), weight=weight)


# What multiplies or looks up and is no matrix of this kind: routers, convolutions, small tables.
BY_THEMSELVES = ('router', 'convolution', 'positions', 'types', 'table')


FAST = ('llama', 'mixtral', 'mamba2', 'bert', 't5', 'chinchilla', 'baichuan2', 'deepseek_v2')


@pytest.mark.parametrize(
  'family', [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in PRESETS]
)
def test_every_matrix_of_a_family_goes_through_the_seam(family):
  module = counts.abstract(with_weight(family, Kept))
  for path, value in parameters.all_parameters(module):
    by_itself = any(name in str(key) for key in path for name in BY_THEMSELVES)
    assert (path[-1] == 'base') == (value.kind != 'vector' and not by_itself), path
  lengths = {'inputs': 8, 'targets': 8}
  assert counts.count(with_weight(family, Kept), lengths) == counts.count(tiny(family), lengths)


@pytest.mark.parametrize(
  'family',
  ['mixtral', *(pytest.param(f, marks=pytest.mark.slow) for f in FAST if f != 'mixtral')],
)
def test_a_model_of_other_matrices_computes_the_same(family):
  with Mesh().use(jax.devices()[:1]):
    logits = []
    for model in (tiny(family), with_weight(family, Kept)):
      names = model.func.inputs
      tokens = {f'{name}_input_tokens': np.arange(1, 9, dtype=np.int32)[None] for name in names}
      run = lambda key, tokens, model=model: model(rngs=nnx.Rngs(params=key))(tokens)[0]
      run = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})
      logits.append(np.asarray(run(jax.random.key(0), tokens)))
  np.testing.assert_allclose(logits[0], logits[1], rtol=1e-6, atol=1e-7)


def test_a_class_that_chooses_its_own_comes_before_the_model():
  model = with_weight('llama', Kept)
  head = functools.partial(model.keywords['head'], weight=weights.plain)
  module = counts.abstract(functools.partial(model, head=head))
  assert isinstance(module.head.kernel, nnx.Param)
  assert isinstance(module.embedder.tokens, Kept)
  # And the choice ends with the model.
  assert isinstance(counts.abstract(tiny('llama')).embedder.tokens, nnx.Param)


def test_a_matrix_says_its_fan_in():
  experts = weights.Matrix((8, 4, 2), ('expert', 'embed', 'mlp'), jnp.zeros, stacked=1)
  output = weights.Matrix((4, 3, 5), ('heads', 'head_dim', 'embed'), jnp.zeros, inputs=2)
  assert (experts.fan_in, output.fan_in) == (4, 12)


def test_a_weight_without_its_matrix_says_what_is_missing():
  matrix = weights.Matrix((2, 2), (None, None), parameters.normal)
  with pytest.raises(NotImplementedError, match='Weight needs __getitem__'):
    weights.Weight(matrix)[...]
