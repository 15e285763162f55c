"""Matrices kept by output: the same numbers, from the form that a CPU multiplies faster."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.inference.by_output import ByOutput, turn_matrices
from research.model.attention import Attention, CrossAttention
from research.model.kernels.few_rows import FEW_ROWS, PARTS
from research.model.layers import Linear
from research.model.part import Context
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


def test_many_rows_read_a_matrix_with_several_axes_of_inputs_as_it_lies():
  linear = Linear({'heads': 3, 'head_dim': 32}, {'embed': 160}, rngs=nnx.Rngs(params=0))
  turn_matrices(linear)
  graphdef, state = nnx.split(linear)
  x = jax.random.normal(jax.random.key(1), (1, 2 * FEW_ROWS, 3, 32))
  product = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  program = product.lower(state, x).compile().as_text()
  turned = re.findall(r'f32\[(?:3,32|96),160\]\S* (?:transpose|copy|fusion)\(', program)
  assert not turned


@pytest.mark.parametrize(
  ('rows', 'outputs', 'divided'),
  # One column and a size that XLA gives to one core; two columns; not divisible; too small; large enough.
  [(1, 400, True), (2, 400, False), (1, 402, False), (1, 200, False), (1, 2000, False)],
)
def test_a_product_that_one_core_would_compute_is_divided(rows, outputs, divided):
  inputs = 400
  linear = Linear({'embed': inputs}, {'mlp': outputs}, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(1), (1, rows, inputs))
  want = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64)
  turn_matrices(linear)
  graphdef, state = nnx.split(linear)
  lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x)
  parts = f'tensor<{PARTS}x{outputs // PARTS}x{inputs}xf32>'
  assert (parts in lowered.as_text()) == divided
  got = lowered.compile()(state, x)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_a_matrix_of_stacked_layers_stays_as_it_is():
  @nnx.vmap
  def stacked(key):
    return Linear({'embed': 4}, {'mlp': 6}, rngs=nnx.Rngs(params=key))

  linear = stacked(jax.random.split(jax.random.key(0), 3))
  turn_matrices(linear)
  assert isinstance(linear.kernel, nnx.Param)


@pytest.mark.parametrize('rows', [1, FEW_ROWS + 1])
def test_matrices_with_the_same_input_are_one_product(rows):
  attention = Attention(24, heads=4, head_dim=6, kv_heads=2, qkv_bias=True, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(1), (1, rows, 24))
  context = Context(positions=jnp.arange(rows)[None])
  want, _ = attention(x, context)
  matrices = [linear.kernel[...] for linear in (attention.query, attention.key, attention.value)]
  turn_matrices(attention)
  joined = [linear.kernel for linear in (attention.query, attention.key, attention.value)]
  assert [(kernel.start, kernel.stop) for kernel in joined] == [(0, 24), (24, 36), (36, 48)]
  for kernel, matrix in zip(joined, matrices, strict=True):
    np.testing.assert_array_equal(kernel[...], matrix)
  np.testing.assert_allclose(attention(x, context)[0], want, atol=1e-6 * float(jnp.abs(want).max()))
  # The parameters hold the joint matrix once, and so does the program multiply with it.
  graphdef, state = nnx.split(attention)
  shapes = sorted(x.shape for x in jax.tree.leaves(state))
  assert shapes == [(2, 6), (2, 6), (4, 6), (24, 4, 6), (48, 24)]
  step = jax.jit(lambda state: nnx.merge(graphdef, state)(x, context)[0])
  program = step.lower(state).compile().as_text()
  assert len(re.findall(r'f32\[(?:48,1|\d+,48|48,\d+)\]\S* (?:dot|custom-call)\(', program)) == 1


def test_keys_of_an_encoder_are_joined_without_queries():
  attention = CrossAttention(8, heads=2, head_dim=4, rngs=nnx.Rngs(params=0))
  turn_matrices(attention)
  assert isinstance(attention.query.kernel, ByOutput)
  assert attention.key.kernel.base is attention.value.kernel.base
