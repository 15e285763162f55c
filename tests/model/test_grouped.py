"""The grouped product against one product per row, on the path of a CPU and on that of accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.model import moe
from research.model.kernels.grouped import grouped_matmul
from research.model.part import Context
from research.parallel.mesh import Mesh

# Compiling is most of the time.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# What a GPU or a TPU would run: `jax.lax.ragged_dot`, which a CPU runs too, slowly.
PATHS = {
  'cpu': jax.lax.platform_dependent,
  'accelerator': lambda *args, cpu, default: default(*args),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
  monkeypatch.setattr(jax.lax, 'platform_dependent', PATHS[request.param])
  return request.param


@pytest.fixture
def one_mesh():
  with Mesh().use(jax.devices()[:1]):
    yield


def test_the_paths_are_two(path):
  x, w, sizes = jnp.ones((16, 4)), jnp.ones((2, 4, 4)), jnp.array([8, 8])
  text = str(jax.make_jaxpr(lambda *args: grouped_matmul(*args, 8))(x, w, sizes))
  assert ('while' not in text) == (path == 'accelerator')
  assert 'ragged_dot' in text


def test_grouped_product_and_its_gradients(path):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(48, 6)).astype('f4'), rng.normal(size=(3, 6, 5)).astype('f4')
  sizes, owner = np.array([16, 0, 24]), np.repeat([0, 2, -1], [16, 24, 8])
  known = (owner >= 0)[:, None]

  def ours(x, w):
    return jnp.sum(jnp.sin(jnp.where(known, grouped_matmul(x, w, sizes, 8), 0)))

  def plain(x, w):
    return jnp.sum(jnp.sin(jnp.where(known, jnp.einsum('ri,rio->ro', x, w[owner]), 0)))

  for f in (lambda f: f, lambda f: jax.grad(f, argnums=(0, 1))):
    for a, b in zip(*(jax.tree.leaves(jit(f(g))(x, w)) for g in (ours, plain)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.usefixtures('path', 'one_mesh')
def test_dropless_experts_and_their_gradients():
  """Each token through each of its experts by hand; a token that is padding goes to none."""
  make = functools.partial(
    moe.MoE, 6, experts=4, mlp=5, activations=(jax.nn.silu, jax.nn.identity),
    router=functools.partial(moe.Router, active=2),
  )  # fmt: skip
  graphdef = nnx.graphdef(jax.eval_shape(lambda: make(rngs=nnx.Rngs(params=jax.random.key(0)))))
  params = jit(lambda key: nnx.state(make(rngs=nnx.Rngs(params=key))))(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 9, 6))
  segments = jnp.ones((2, 9), int).at[1, 6:].set(0)

  def ours(params, x):
    positions = jnp.zeros_like(segments)
    part = nnx.merge(graphdef, params)
    return part(x, Context(positions=positions, segments=segments))[0]

  def plain(params, x):
    part = nnx.merge(graphdef, params)
    weights, index, _ = part.router(x, segments > 0)
    one = jax.nn.one_hot(index, 4) * (segments > 0)[..., None, None]
    gate, up = (jnp.einsum('ble,xem->blxm', x, w[...]) for w in part.experts.inputs)
    y = jnp.einsum('blxm,xme->blxe', jax.nn.silu(gate) * up, part.experts.output[...])
    return jnp.einsum('blxe,blkx,blk->ble', y, one, weights)

  def result(f):
    y, back = jax.vjp(f, params, x)
    return y, back(jnp.cos(y))

  both = jit(lambda: (result(ours), result(plain)))()
  for a, b in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
