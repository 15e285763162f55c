"""The grouped product against one product per row."""

import jax
import jax.numpy as jnp
import numpy as np

from research.model.grouped import grouped_matmul


def test_grouped_product_and_its_gradients():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(48, 6)).astype('f4'), rng.normal(size=(3, 6, 5)).astype('f4')
  sizes, owner = np.array([16, 0, 24]), np.repeat([0, 2, -1], [16, 24, 8])
  known = (owner >= 0)[:, None]

  def ours(x, w):
    return jnp.sum(jnp.sin(jnp.where(known, grouped_matmul(x, w, sizes, 8), 0)))

  def plain(x, w):
    return jnp.sum(jnp.sin(jnp.where(known, jnp.einsum('ri,rio->ro', x, w[owner]), 0)))

  for f in (lambda f: f, lambda f: jax.grad(f, argnums=(0, 1))):
    for a, b in zip(*(jax.tree.leaves(jax.jit(f(g))(x, w)) for g in (ours, plain)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)
