"""The grouped product against one product per row, on the paths of CPUs, of GPUs and of TPUs."""

import functools
import importlib.util
import sys

import jax
import jax.experimental.pallas.ops.tpu.megablox
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.compilation import chips
from research.model import moe
from research.model.experts import Experts
from research.model.kernels import grouped
from research.model.kernels.grouped import grouped_matmul
from research.model.part import Context
from research.parallel.axes import per_device, shard
from research.parallel.mesh import Mesh

# Compiling is most of the time.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# What a GPU would run is `jax.lax.ragged_dot`, which a CPU runs too, slowly; megablox, by Pallas's interpreter.
PATHS = {'cpu': 'while', 'gpu': 'ragged_dot', 'tpu': 'pallas_call'}
# `megablox.gmm` is a function of this name as well.
MEGABLOX = sys.modules['jax.experimental.pallas.ops.tpu.megablox.gmm']


def use_path(path, monkeypatch, lanes=8):
  """Makes a CPU take the path; for that of TPUs, with blocks that are multiples of `lanes`."""
  if path != 'cpu':
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
  if path == 'tpu':
    monkeypatch.setattr(grouped, 'platform', lambda: 'tpu')
    monkeypatch.setattr(grouped, 'LANES', lanes)
    for name in ('gmm', 'tgmm'):
      kernel = functools.partial(getattr(MEGABLOX, name), interpret=True)
      monkeypatch.setattr(MEGABLOX, name, kernel)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
  use_path(request.param, monkeypatch)
  return request.param


@pytest.fixture
def one_mesh():
  with Mesh().use(jax.devices()[:1]):
    yield


def test_every_path_has_its_kernel(path, monkeypatch):
  if path == 'cpu':
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: cpu(*args))
  x, w, sizes = jnp.ones((16, 4)), jnp.ones((2, 4, 4)), jnp.array([8, 8])

  def both(x, w):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, 8), x, w)
    return y, back(y)

  text = str(jax.make_jaxpr(both)(x, w))
  assert [name for name in PATHS.values() if name in text] == [PATHS[path]]


def test_megablox_is_for_more_than_one_group_of_whole_blocks(monkeypatch):
  use_path('tpu', monkeypatch, lanes=128)
  x, w = jnp.ones((256, 4)), jnp.ones((2, 4, 4))
  assert grouped._suits_megablox(x, w, 128)
  assert not grouped._suits_megablox(x, w, 64)
  assert not grouped._suits_megablox(x, w[:1], 128)
  assert not grouped._suits_megablox(x.astype(jnp.float16), w.astype(jnp.float16), 128)
  monkeypatch.setattr(grouped, 'platform', lambda: 'gpu')
  assert not grouped._suits_megablox(x, w, 128)


# Inputs and outputs of a matrix, the sizes of its groups in blocks, of six blocks in all, and whether a tile
# has all inputs.
PRODUCTS = {
  'an empty group': (6, 5, [2, 0, 3], True),
  'no rows': (6, 5, [0, 0, 0], True),
  'all rows': (6, 5, [0, 6, 0], True),
  'tiles that do not divide': (70, 45, [1, 0, 0, 4], False),
  'outputs that no tile divides': (70, 45, [1, 0, 0, 4], True),
}


@pytest.mark.parametrize('case', PRODUCTS)
def test_megablox_is_the_product_in_float64(case, monkeypatch):
  """Rows after the last group are not numbers, and change nothing before them."""
  use_path('tpu', monkeypatch)
  monkeypatch.setattr(grouped, 'TILE', 128)  # 32 numbers
  inputs, outputs, blocks, whole = PRODUCTS[case]
  if not whole:
    monkeypatch.setattr(grouped, 'FAST_MEMORY', 0)
  assert (grouped._tiles(8, inputs, outputs, jnp.float32)[1] == inputs) == whole
  sizes = 8 * np.array(blocks)
  owner = np.repeat(np.arange(len(sizes)), sizes)
  rng = np.random.default_rng(0)
  x, dy = (rng.normal(size=(48, n)).astype('f4') for n in (inputs, outputs))
  w = rng.normal(size=(len(sizes), inputs, outputs)).astype('f4')
  for array in (x, dy):
    array[len(owner) :] = np.nan

  def both(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, 8), x, w)
    return y, *back(dy)

  y, dx, dw = jit(both)(x, w, jnp.asarray(sizes), dy)
  assert not np.any(dx[len(owner) :])
  x, dy = (array[: len(owner)].astype('f8') for array in (x, dy))
  matrices = w.astype('f8')[owner]
  outer = np.zeros(w.shape)
  np.add.at(outer, owner, x[:, :, None] * dy[:, None])
  expected = np.einsum('ri,rio->ro', x, matrices), np.einsum('ro,rio->ri', dy, matrices), outer
  for a, b in zip((y[: len(owner)], dx[: len(owner)], dw), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


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


def test_experts_over_devices_by_megablox(monkeypatch):
  """Two devices' experts, of two each, on a mesh of four: the sums and gradients of one CPU."""
  make = functools.partial(
    Experts, 8, 4, active=2, mlp=8, activations=(jax.nn.silu, jax.nn.identity), capacity=None
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 16, 8)).astype('f4')
  weights = rng.random((4, 16, 2)).astype('f4')
  # Most tokens choose experts of one device, and none the last: several rounds, and a group without rows.
  index = rng.permuted(np.broadcast_to([0, 1, 0, 2], (4, 16, 4)), axis=-1)[..., :2]

  def run(mesh, devices):
    with mesh.use(devices):
      graphdef, params = nnx.split(make(rngs=nnx.Rngs(params=jax.random.key(0))))

      def loss(params, x, weights):
        place = lambda y: shard(y, 'batch', None, None)
        y = nnx.merge(graphdef, params)(place(x), place(weights), place(jnp.asarray(index)))
        return jnp.sum(jnp.sin(y))

      return jax.tree.map(np.asarray, jit(jax.value_and_grad(loss, (0, 1, 2)))(params, x, weights))

  expected = run(Mesh(), jax.devices()[:1])
  use_path('tpu', monkeypatch)
  found = run(Mesh(data=1, fsdp=2, expert=2), jax.devices()[:4])
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_a_tpu_compiles_the_necessary_products_alone(dtype):
  """The largest tiles and widths that no tile divides, in the fast memory of the chip that has least."""
  chips.prepare('v5e:2x2')
  devices, _ = chips.devices_of('v5e:2x2')
  rows, inputs, outputs, groups = 1024, 4096, 1408, 4

  def both(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, 256), x, w)
    return y, back(dy)

  shapes = ((rows, inputs), (groups, inputs, outputs), (groups,), (rows, outputs))
  dtypes = (dtype, dtype, jnp.int32, dtype)
  with Mesh(data=1).use(devices[:1]) as mesh:
    where = jax.sharding.NamedSharding(mesh, jax.P())
    pairs = zip(shapes, dtypes, strict=True)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in pairs]
    compiled = (
      jax.jit(per_device(both, in_specs=jax.P(), out_specs=jax.P())).lower(*arrays).compile()
    )
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
  necessary = 6 * rows * inputs * outputs
  assert necessary <= compiled.cost_analysis()['flops'] < 1.01 * necessary
