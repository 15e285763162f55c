"""What the backward pass keeps changes neither losses nor gradients, but memory."""

import functools
import re

import jax
import numpy as np
import pytest
from families import tiny
from flax import nnx

from research.core.errors import Invalid
from research.model import stack
from research.parallel import mesh

ROWS, LENGTH = 4, 16


@functools.cache
def step(remat, layers=1):
  """(compiled gradient, its result) of a tiny LLaMA of 8 layers in a scan."""
  knobs = f"Stack.remat='{remat}'", f'Stack.remat_layers={layers}'
  model = tiny('llama', ('Stack.scan=True', *knobs, 'LAYERS=8'))
  tokens = np.random.default_rng(0).integers(1, 64, (ROWS, LENGTH)).astype(np.int32)
  with mesh.Mesh(data=1).use(jax.devices()[:1]):
    make = lambda: model(rngs=nnx.Rngs(params=jax.random.key(0)))
    graphdef, params = nnx.graphdef(jax.eval_shape(make)), nnx.to_pure_dict(nnx.state(make()))

    def loss(params):
      logits, _ = nnx.merge(graphdef, params)({'decoder_input_tokens': tokens})
      return (jax.nn.log_softmax(logits) ** 2).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return compiled, jax.tree.map(np.asarray, compiled(params))


@pytest.mark.parametrize('remat', [name for name in stack.REMAT if name != 'none'])
def test_every_policy_gives_the_same_gradients(remat):
  for a, b in zip(*(jax.tree.leaves(step(name)[1]) for name in ('none', remat)), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max())


def test_full_keeps_less_than_none():
  size = lambda remat: step(remat)[0].memory_analysis().temp_size_in_bytes
  assert size('full') < 0.8 * size('none')


def test_the_input_of_every_second_layer_is_enough():
  for a, b in zip(*(jax.tree.leaves(step('full', n)[1]) for n in (1, 2)), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max())
  stored = [set(re.findall(r'f32\[([\d,]+)\]', step('full', n)[0].as_text())) for n in (1, 2)]
  inputs = f'{ROWS},{LENGTH},16'
  assert f'8,{inputs}' in stored[0]
  assert f'8,{inputs}' not in stored[1]
  assert f'4,{inputs}' in stored[1]


@pytest.mark.parametrize(
  ('knobs', 'says'),
  [
    (("Stack.remat='none'", 'Stack.remat_layers=2'), r"remat_layers: 2 needs .*remat = 'full'"),
    (
      ("Stack.remat='full'", 'Stack.remat_layers=3'),
      r'remat_layers: 3 does not divide the 8 layers',
    ),
  ],
)
def test_layers_that_do_not_group_are_one_sentence(knobs, says):
  model = tiny('llama', ('Stack.scan=True', 'LAYERS=8', *knobs))
  batch = {'decoder_input_tokens': np.ones((ROWS, LENGTH), np.int32)}
  run = lambda: model(rngs=nnx.Rngs(params=jax.random.key(0)))(batch)
  with mesh.Mesh(data=1).use(jax.devices()[:1]), pytest.raises(Invalid, match=says):
    jax.eval_shape(run)
