"""What the backward pass keeps changes neither losses nor gradients, but memory."""

import functools

import jax
import numpy as np
import pytest
from families import tiny
from flax import nnx

from research.model import stack
from research.parallel import mesh

ROWS, LENGTH = 4, 16


@functools.cache
def step(remat):
  """(compiled gradient, its result) of a tiny LLaMA of 4 layers in a scan."""
  model = tiny('llama', ('Stack.scan=True', f"Stack.remat='{remat}'", 'LAYERS=4'))
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
