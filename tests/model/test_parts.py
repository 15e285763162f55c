"""The parts by themselves, against their equations written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.errors import Invalid
from research.model import attention, latent, layers, mamba, mamba2, moe, positions
from research.model.part import Context
from research.parallel.mesh import Mesh

EMBED = 16
ACTIVATIONS = (jax.nn.silu, lambda x: x)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True)
def _one_device():
  with Mesh().use(jax.devices()[:1]):
    yield


def build(part, **knobs):
  """The part's graph and parameters."""
  init = lambda key: part(EMBED, rngs=nnx.Rngs(params=key), **knobs)
  graphdef = nnx.graphdef(jax.eval_shape(init, jax.random.key(0)))
  return graphdef, jit(lambda key: nnx.to_pure_dict(nnx.state(init(key))))(jax.random.key(0))


def inputs(batch=2, length=24, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, length, EMBED)).astype(np.float32)


def context(x, segments=None):
  places = np.tile(np.arange(x.shape[1], dtype=np.int32), (x.shape[0], 1))
  return Context(positions=places, segments=segments)


# Mixtures of experts.


def experts(**knobs):
  router = functools.partial(moe.Router, **{'active': 2, **knobs.pop('router', {})})
  return build(moe.MoE, experts=4, mlp=8, activations=ACTIVATIONS, router=router, **knobs)


def written_out(params, x, weights, index):
  """Every expert for every token in numpy, and the chosen ones' weighted sum."""
  p = jax.tree.map(np.asarray, params['experts'])
  silu = lambda z: z / (1 + np.exp(-z))
  y = np.zeros_like(x)
  for e in range(4):
    out = (silu(x @ p['inputs'][0][e]) * (x @ p['inputs'][1][e])) @ p['output'][e]
    y += out * np.where(index == e, weights, 0).sum(-1)[..., None]
  return y


def test_dropless_experts_are_the_weighted_sum_of_the_chosen():
  graphdef, params = experts()
  x = inputs()

  def run(params, x):
    part = nnx.merge(graphdef, params)
    return part(x, context(x)), part.router(x, None)[:2]

  (y, _), (weights, index) = jit(run)(params, x)
  weights, index = np.asarray(weights), np.asarray(index)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  assert (index[..., 0] != index[..., 1]).all()
  np.testing.assert_allclose(y, written_out(params, x, weights, index), atol=1e-5)


def test_capacity_keeps_the_earlier_tokens_and_drops_the_rest():
  graphdef, params = experts(router={'active': 1, 'normalise': False}, capacity=0.5)
  x = inputs()

  def run(params, x):
    part = nnx.merge(graphdef, params)
    return part(x, context(x))[0], part.router(x, None)[:2]

  y, (weights, index) = jit(run)(params, x)
  weights, index = np.asarray(weights), np.asarray(index)
  places = int(np.ceil(0.5 * 24 / 4))
  kept = np.zeros(index.shape, bool)
  for row in range(2):
    for e in range(4):
      kept[row, np.flatnonzero(index[row, :, 0] == e)[:places]] = True
  assert not kept.all()
  want = written_out(params, x, np.where(kept, weights, 0), index)
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert (np.asarray(y)[~kept[..., 0]] == 0).all()


def test_padding_goes_to_no_expert_and_counts_for_no_penalty():
  graphdef, params = experts()
  x = inputs()
  segments = np.ones((2, 24), np.int32)
  segments[:, 16:] = 0
  run = jit(lambda params, x, s: nnx.merge(graphdef, params)(x, context(x, s)))
  y, penalties = run(params, x, segments)
  assert (np.asarray(y)[:, 16:] == 0).all()
  x[:, 16:] = 100.0
  _, again = run(params, x, segments)
  assert penalties.keys() == {'load_balance', 'router_z'}
  for name, value in penalties.items():
    assert again[name] == pytest.approx(float(value), rel=1e-6)


def test_balance_is_its_coefficient_when_uniform_and_more_when_not():
  graphdef, params = experts(router={'balance': 0.5, 'z_loss': 0.0, 'active': 1})
  run = jit(lambda params, x: nnx.merge(graphdef, params)(x, context(x))[1]['load_balance'])
  one_hot = np.zeros((1, 4, EMBED), np.float32)
  one_hot[0, np.arange(4), np.arange(4)] = 1.0
  kernel = np.zeros((EMBED, 4), np.float32)
  kernel[:4] = 5 * np.eye(4)
  spread = {**params, 'router': {'kernel': kernel}}
  assert float(run(spread, one_hot)) == pytest.approx(0.5, rel=1e-5)
  assert float(run(spread, np.repeat(one_hot[:, :1], 4, axis=1))) > 1.5


def test_groups_limit_the_choice():
  graphdef, params = experts(
    router={'scores': 'sigmoid', 'groups': 2, 'active_groups': 1, 'group_top': 2}
  )
  run = jit(lambda params, x: nnx.merge(graphdef, params).router(x, None)[1])
  index = np.asarray(run(params, inputs()))
  assert (index[..., 0] // 2 == index[..., 1] // 2).all()
  assert len(np.unique(index)) == 4


@pytest.mark.parametrize(
  ('router', 'field'),
  [({'active': 5}, 'active'), ({'scores': 'softmx'}, 'scores'), ({'groups': 3}, 'groups')],
)
def test_a_router_that_cannot_be_names_the_field(router, field):
  with pytest.raises(Invalid) as error:
    experts(router=router)
  assert error.value.field == field


# State spaces.


def mamba_written_out(params, x):
  """Algorithm 2 of the paper, one token after another, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  silu = lambda z: z / (1 + np.exp(-z))
  gate, x = x @ p['gate']['kernel'], x @ p['input']['kernel']
  past = np.pad(x, ((0, 0), (3, 0), (0, 0)))
  taps = [past[:, i : i + x.shape[1]] * p['convolution']['kernel'][i] for i in range(4)]
  x = silu(sum(taps) + p['convolution']['bias'])
  step = np.log1p(np.exp(x @ p['step_down']['kernel'] @ p['step']['kernel'] + p['step_bias']))
  b, c, a = x @ p['b']['kernel'], x @ p['c']['kernel'], -np.exp(p['log_a'])
  h, y = np.zeros((x.shape[0], *a.shape)), np.zeros_like(x)
  for t in range(x.shape[1]):
    h = np.exp(step[:, t, :, None] * a) * h + (step * x)[:, t, :, None] * b[:, t, None]
    y[:, t] = np.einsum('bis,bs->bi', h, c[:, t]) + p['d'] * x[:, t]
  return (y * silu(gate)) @ p['output']['kernel']


# What a CPU runs, and what accelerators would.
PATHS = {
  'cpu': jax.lax.platform_dependent,
  'accelerator': lambda *args, cpu, default: default(*args),
}


@pytest.mark.parametrize('path', PATHS)
def test_mamba_is_its_recurrence(path, monkeypatch):
  monkeypatch.setattr(jax.lax, 'platform_dependent', PATHS[path])
  graphdef, params = build(mamba.Mamba, inner=8, rank=2, state=4, chunk=5)
  x = inputs()
  run = lambda params, x: nnx.merge(graphdef, params)(x, context(x))[0]
  text = str(jax.make_jaxpr(run)(params, x))
  assert ('platform_index' in text) == (path == 'cpu')
  y = jit(run)(params, x)
  np.testing.assert_allclose(y, mamba_written_out(params, x), atol=1e-5)


def test_both_ways_through_a_chunk_of_mamba_are_one():
  """Values and gradients, where a document begins inside the chunk."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  a, h, x, b, c = -np.exp(draw(3, 4)), draw(2, 3, 4), draw(2, 7, 3), draw(2, 7, 4), draw(2, 7, 4)
  step, first = np.exp(draw(2, 7, 3) - 1), np.zeros((2, 7), bool)
  first[:, 3], first[1, 0] = True, True

  def result(way, *args):
    y, back = jax.vjp(lambda *args: way(*args, first), *args)
    return y, back(jax.tree.map(jnp.cos, y))

  ways = (mamba._token_by_token, mamba._all_tokens_at_once)
  both = jit(lambda *args: [result(way, *args) for way in ways])(a, h, x, step, b, c)
  for u, v in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_allclose(u, v, atol=1e-5)


@pytest.mark.parametrize('groups', [1, 2])
def test_mamba2_is_its_recurrence_whatever_the_chunk(groups):
  knobs = {'heads': 4, 'head_dim': 2, 'state': 3, 'groups': groups}
  graphdef, params = build(mamba2.Mamba2, chunk=7, **knobs)
  rng = np.random.default_rng(0)
  x, step = rng.normal(size=(2, 20, 4, 2)), rng.uniform(0.1, 1, size=(2, 20, 4))
  b, c = rng.normal(size=(2, 2, 20, groups, 3))
  segments = np.where(np.arange(20) < 9, 1, 2)[None].repeat(2, 0).astype(np.int32)

  @jit
  def scan(params, x, step, b, c, segments):
    return nnx.merge(graphdef, params).scan(x, step, b, c, context(x, segments))

  y = scan(params, *(v.astype(np.float32) for v in (x, step, b, c)), segments)
  a = -np.exp(np.asarray(params['log_a'], np.float64))
  h = np.zeros((2, 4, 2, 3))
  per_head = lambda v: np.repeat(v, 4 // groups, axis=1)
  for t in range(20):
    h = np.zeros_like(h) if t == 9 else h
    h = np.exp(step[:, t] * a)[..., None, None] * h
    h = h + np.einsum('bhp,bhn->bhpn', step[:, t, :, None] * x[:, t], per_head(b[:, t]))
    want = np.einsum('bhpn,bhn->bhp', h, per_head(c[:, t]))
    np.testing.assert_allclose(np.asarray(y)[:, t], want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('part', [mamba.Mamba, mamba2.Mamba2])
def test_memory_of_the_backward_pass_is_linear_in_length_with_a_small_constant(part):
  knobs = {'inner': 256, 'rank': 8, 'state': 32, 'chunk': 64}
  if part is mamba2.Mamba2:
    knobs = {'heads': 16, 'head_dim': 16, 'state': 64, 'chunk': 64}
  graphdef, params = build(part, **knobs)

  def temporary(length):
    x = jax.ShapeDtypeStruct((1, length, EMBED), jnp.float32)
    loss = lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x, context(x))[0])
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(1024), temporary(4096)
  states = 4 * 3072 * 256 * knobs['state']  # the states of all the added tokens, in bytes
  assert long - short < 4.1 * short
  assert long - short < states  # they are never held, nor is a multiple of them


# Positions.


def test_ntk_scaling_is_a_larger_base():
  frequency = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
  scaled, magnitude = positions.ntk_scaling(frequency, factor=4.0)
  base = 10_000.0 * 4.0 ** (16 / 14)
  np.testing.assert_allclose(scaled, base ** (-np.arange(0, 16, 2) / 16), rtol=1e-6)
  assert magnitude == 1.0


def test_rotations_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  for knobs in ({}, {'interleaved': True}, {'fraction': 0.5}):
    rotate = lambda x, at, knobs=knobs: positions.rotary(x, np.array([[at]]), **knobs)
    product = lambda i, j, rotate=rotate: float(jnp.sum(rotate(q, i) * rotate(k, j)))
    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_rotary_positions_of_an_odd_number_of_channels_are_refused():
  def sizes(**changed):
    latent_sizes = {'heads': 2, 'head_dim': 5, 'rotary_dim': 4, 'value_dim': 8, 'key_rank': 8}
    return {**latent_sizes, 'norm': layers.RMSNorm, 'rotary': positions.rotary, **changed}

  odd = r'is odd, and rotary positions turn pairs of channels: make it even\.'
  for part in (attention.Attention, attention.CrossAttention):
    with pytest.raises(Invalid, match=rf'{part.__name__}\.head_dim: 15 {odd}'):
      build(part, heads=2, head_dim=15, rotary=positions.rotary)
  with pytest.raises(Invalid, match=rf'LatentAttention\.rotary_dim: 3 {odd}'):
    build(latent.LatentAttention, **sizes(rotary_dim=3))
  build(latent.LatentAttention, **sizes())
  build(attention.Attention, heads=2, head_dim=15)
  # What counts is the part of a head that is rotated.
  for size, fraction, rotated in (
    (12, 0.25, 3),
    (16, 0.1, 1),
    (16, 0.01, 0),
    (16, 1.25, 20),
    (16, -0.5, -8),
  ):
    rotary = functools.partial(positions.rotary, base=100.0, fraction=fraction)
    why = (
      rf'rotary\.fraction = {fraction} of {size} is {rotated}: .* even number from 2 to {size}\.'
    )
    with pytest.raises(Invalid, match=rf'Attention\.head_dim: .*{why}'):
      build(attention.Attention, heads=2, head_dim=size, rotary=rotary)
    with pytest.raises(Invalid, match=rf'LatentAttention\.rotary_dim: .*{why}'):
      build(latent.LatentAttention, **sizes(rotary_dim=size, rotary=rotary))
  build(
    attention.Attention,
    heads=2,
    head_dim=15,
    rotary=functools.partial(positions.rotary, fraction=0.4),
  )


def test_sinusoids_are_sines_and_cosines():
  x = np.asarray(positions.sinusoidal(np.array([[0, 3]]), 8))
  assert x.shape == (1, 2, 8)
  np.testing.assert_allclose(x[0, 0], [0] * 4 + [1] * 4, atol=1e-7)
  assert x[0, 1, 0] == pytest.approx(np.sin(3.0), abs=1e-6)
  assert x[0, 1, 7] == pytest.approx(np.cos(3.0 / 10_000), abs=1e-6)


def test_a_norm_of_a_part_that_is_not_a_size_is_refused():
  with pytest.raises(Invalid, match=r'Mamba.inner: 0 is not a size'):
    build(mamba.Mamba, inner=0, rank=2, norm=layers.RMSNorm)
