"""Matrices kept by output: the same numbers, from the form that a CPU multiplies faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.inference.by_output import ByOutput, turn_matrices
from research.model.layers import Linear
from research.model.parameters import FEW_ROWS
from research.parallel.mesh import Mesh


@pytest.fixture(autouse=True)
def one_core():
  with Mesh().use(jax.devices()[:1]):
    yield


@pytest.mark.parametrize('rows', [1, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(
  ('inputs', 'outputs'),
  [({'embed': 24}, {'heads': 3, 'head_dim': 5}), ({'heads': 3, 'head_dim': 5}, {'embed': 24})],
)
def test_a_turned_matrix_gives_the_same_product(rows, inputs, outputs):
  linear = Linear(inputs, outputs, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(1), (1, rows, *inputs.values()))
  want, whole = linear(x), linear.kernel[...]
  turn_matrices(linear)
  assert isinstance(linear.kernel, ByOutput)
  assert linear.kernel.base.shape == (*outputs.values(), *inputs.values())
  np.testing.assert_array_equal(linear.kernel[...], whole)
  scale = float(jnp.abs(want).max())
  np.testing.assert_allclose(linear(x), want, atol=1e-6 * scale)


def test_a_matrix_of_stacked_layers_stays_as_it_is():
  @nnx.vmap
  def stacked(key):
    return Linear({'embed': 4}, {'mlp': 6}, rngs=nnx.Rngs(params=key))

  linear = stacked(jax.random.split(jax.random.key(0), 3))
  turn_matrices(linear)
  assert isinstance(linear.kernel, nnx.Param)
