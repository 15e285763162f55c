"""Relative attention against the equation of its paper, token by token, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.model.part import Context
from research.model.relative import RelativeAttention
from research.parallel.mesh import Mesh

EMBED, HEADS, HEAD_DIM, BATCH, LENGTH = 24, 4, 6, 8, 7


def make(key=0, **knobs):
  part = RelativeAttention(
    EMBED, heads=HEADS, head_dim=HEAD_DIM, **knobs, rngs=nnx.Rngs(params=key)
  )
  for i, bias in enumerate((part.content_bias, part.position_bias)):
    bias[...] = bias[...] + jax.random.normal(jax.random.key(i), bias.shape)
  return part


def reference(part, x: np.ndarray) -> np.ndarray:
  """Section 3.3 of arXiv:1901.02860, written as its sums."""
  f = lambda y: np.asarray(y[...], np.float64)
  frequency = [10_000 ** (-2 * i / EMBED) for i in range(EMBED // 2)]
  y = np.zeros(x.shape)
  for b in range(x.shape[0]):
    for h in range(HEADS):
      q, k, v = (x[b] @ f(p.kernel)[:, h] for p in (part.query, part.key, part.value))
      logits = np.full((LENGTH, LENGTH), -np.inf)
      for i in range(LENGTH):
        for j in range(i + 1):
          r = np.array(
            [np.sin((i - j) * w) for w in frequency] + [np.cos((i - j) * w) for w in frequency]
          )
          content = (q[i] + f(part.content_bias)[h]) @ k[j]
          position = (q[i] + f(part.position_bias)[h]) @ (r @ f(part.position)[:, h])
          logits[i, j] = (content + position) / HEAD_DIM**0.5
      weights = np.exp(logits - logits.max(axis=1, keepdims=True))
      weights /= weights.sum(axis=1, keepdims=True)
      y[b] += weights @ v @ f(part.output.kernel)[h]
  return y


@pytest.mark.parametrize('mesh', [Mesh(data=8), Mesh(data=2, fsdp=2, tensor=2)])
def test_is_the_papers_equation_on_any_mesh(mesh):
  with mesh.use():
    part = make()
    x = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, EMBED))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    y, penalties = jax.jit(lambda part, x: part(x, Context(positions=positions)))(part, x)
    want = reference(part, np.asarray(x, np.float64))
  assert penalties == {}
  np.testing.assert_allclose(np.asarray(y), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_counts_one_projection_more():
  with Mesh(data=8).use():
    part = jax.eval_shape(make, jax.random.key(0))
  shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(part)}
  assert (EMBED, HEADS, HEAD_DIM) in shapes
  cost = part.cost(LENGTH, 0)
  assert cost.full == 6 * LENGTH * LENGTH * HEADS * HEAD_DIM
  assert cost.visible == 6 * LENGTH * (LENGTH + 1) // 2 * HEADS * HEAD_DIM
