"""Every kind of parallelism, and products of two, give the losses and gradients of one device.

In float32; the loss to 1e-5 of itself, every gradient to 1e-5 of its largest entry. Models are a decoder with
grouped queries, an encoder-decoder with relative positions, a mixture of experts, and Mamba, on packed rows.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import tiny
from flax import nnx

from research.compilation import hlo
from research.core.errors import Invalid
from research.model import pipeline, positions
from research.model.attention import visible
from research.model.experts import Experts
from research.model.kernels import dot_product, ring
from research.model.part import Context
from research.parallel import axes, hosts
from research.parallel.mesh import Mesh
from research.training.losses import CrossEntropy
from research.training.program import make_program

ROWS, LENGTH, TOLERANCE = 8, 16, 1e-5
MODELS = {'decoder': 'llama2', 'encoder_decoder': 't5', 'moe': 'mixtral', 'mamba': 'mamba'}
OTHERS = {
  'moe_capacity': ('mixtral', 'MoE.capacity=1.0'),
  'mamba2': ('mamba2',),
  'latent': ('deepseek_v3',),
  'relative': ('gopher',),
  'window': ('llama2', 'Attention.window=5'),
  'alibi': ('bloom',),
  'prefix': ('glm',),
}
SEQUENCE_PARALLEL = {'sequence': ('context', 'tensor')}


@functools.cache
def model_of(name):
  family, *bindings = OTHERS.get(name) or (MODELS[name],)
  # The load balance of a microbatch is another than that of a batch: without it they are equal.
  moe = ['Router.balance=0.0'] if name.startswith('moe') else []
  deep = {'t5': ('ENCODER_LAYERS', 'DECODER_LAYERS'), 'deepseek_v3': ()}.get(family, ('LAYERS',))
  return tiny(family, ('Stack.scan=True', *(f'{layers}=4' for layers in deep), *moe, *bindings))


def packed(rng, length, documents=3):
  """Rows of `documents` documents and some padding, as the stream would have them."""
  cuts = np.sort(rng.integers(1, length, (ROWS, documents)), axis=1)
  place = np.arange(length)
  segments = 1 + np.sum(place >= cuts[:, :-1, None], axis=1)
  starts = np.concatenate([np.zeros((ROWS, 1), int), cuts[:, :-1]], axis=1)
  positions = place - np.take_along_axis(starts, segments - 1, axis=1)
  real = place < np.maximum(cuts[:, -1:], length - 3)
  return {
    'input_tokens': np.where(real, rng.integers(1, 64, (ROWS, length)), 0),
    'segment_ids': np.where(real, segments, 0),
    'positions': np.where(real, positions, 0),
  }


@functools.cache
def batch_of(name):
  rng = np.random.default_rng(0)
  batch = {f'decoder_{k}': v for k, v in packed(rng, LENGTH).items()}
  batch['decoder_target_tokens'] = np.roll(batch['decoder_input_tokens'], -1, axis=1)
  batch['decoder_loss_weights'] = (batch['decoder_target_tokens'] > 0) & (
    rng.random((ROWS, LENGTH)) < 0.8
  )
  if name == 'encoder_decoder':
    batch |= {f'encoder_{k}': v for k, v in packed(rng, 2 * LENGTH).items()}
  if name == 'prefix':
    batch['decoder_causal_attention'] = batch['decoder_positions'] < 3
  return {k: v.astype(np.int32) for k, v in batch.items()}


def compiled(f):
  """jit without most optimisations: what is compared is small, and compiling is nearly all of the time."""
  options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return jax.jit(f, compiler_options=options)


def run_of(name, **more):
  """What a program asks of a run."""
  facts = {
    'loss': CrossEntropy(z_loss=1e-4),
    'init': None,
    'learns': None,
    'microbatches': 1,
    'logits_chunks': 2,
    'batch_size': ROWS,
    'target_length': LENGTH,
  }
  return types.SimpleNamespace(model=model_of(name), **(facts | more))


def program_of(run, params=None):
  """A run's program under the mesh in use, and the parameters there (only shapes where none are given)."""
  abstract = jax.eval_shape(lambda: run.model(rngs=nnx.Rngs(params=jax.random.key(0))))
  shapes = nnx.to_pure_dict(nnx.state(abstract))
  place = lambda x: jax.sharding.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
  params = shapes if params is None else jax.device_put(params, jax.tree.map(place, shapes))
  return make_program(run), params


def results(name, mesh, devices=None, params=None):
  """(loss, what it is made of, gradients) as host arrays, and the parameters, which one device makes."""
  run = run_of(name)
  with mesh.use(devices):
    if params is None:
      make = lambda key: nnx.to_pure_dict(nnx.state(run.model(rngs=nnx.Rngs(params=key))))
      params = jax.tree.map(np.asarray, compiled(make)(jax.random.key(0)))
    program, placed = program_of(run, params)
    gradient = compiled(jax.value_and_grad(program.loss, has_aux=True))
    (loss, sums), grads = gradient(placed, hosts.place(batch_of(name)))
    return jax.tree.map(np.asarray, (loss, sums, grads)), params


@functools.cache
def one_device(name):
  return results(name, Mesh(), jax.devices()[:1])


def check(name, **sizes):
  (loss, sums, grads), params = one_device(name)
  mesh = Mesh(**{'data': -1, **sizes})
  (loss2, sums2, grads2), _ = results(name, mesh, params=params)
  np.testing.assert_allclose(loss2, loss, rtol=TOLERANCE)
  for key, value in sums.items():
    np.testing.assert_allclose(sums2[key], value, rtol=TOLERANCE, atol=1e-7, err_msg=key)
  # Without rotation a key's bias has no gradient but rounding: it is measured against the others'.
  least = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(grads))
  for (path, g), g2 in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grads2), strict=True):
    atol = TOLERANCE * max(np.abs(g).max(), least)
    np.testing.assert_allclose(g2, g, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


# How many devices each kind gets; data fills what is left of the eight.
KINDS = {'fsdp': 2, 'tensor': 2, 'context': 4, 'stage': 2, 'expert': 2}
PRODUCTS = [
  (name, kinds)
  for name in MODELS
  for kinds in [(), *((kind,) for kind in KINDS), *itertools.combinations(KINDS, 2)]
  if name == 'moe' or 'expert' not in kinds
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('decoder', {'fsdp': 2, 'tensor': 2, 'context': 2}),
    ('moe', {'data': 2, 'expert': 2, 'stage': 2}),
  ],
)
def test_products_of_three_change_nothing(name, sizes):
  check(name, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kinds'), PRODUCTS)
def test_products_of_two_change_nothing(name, kinds):
  check(name, **{kind: KINDS[kind] for kind in kinds})


def test_a_sum_in_bfloat16_rounds_gradients_and_nothing_else():
  (loss, _, grads), params = one_device('decoder')
  (loss2, _, grads2), _ = results(
    'decoder', Mesh(data=2, fsdp=4, sum_dtype='bfloat16'), params=params
  )
  np.testing.assert_allclose(loss2, loss, rtol=TOLERANCE)
  matrices = [
    (g, g2) for g, g2 in zip(*map(jax.tree.leaves, (grads, grads2)), strict=True) if g.ndim > 2
  ]
  for g, g2 in matrices:
    # Seven sums of numbers of 8 bits.
    np.testing.assert_allclose(g2, g, rtol=0, atol=8 * 2**-9 * np.abs(g).max())
    assert (g2 != g).any()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('decoder', {'data': 2, 'fsdp': 2, 'fsdp_outer': 2, 'sum_dtype': 'float32'}),
    ('moe', {'fsdp': 2, 'fsdp_outer': 2, 'expert': 2}),
    ('decoder', {'stage': 2, 'fsdp': 2, 'fsdp_outer': 2}),
    ('decoder', {'tensor': 2, 'context': 2, 'rules': SEQUENCE_PARALLEL}),
    ('encoder_decoder', {'tensor': 2, 'rules': SEQUENCE_PARALLEL}),
    ('moe', {'tensor': 2, 'expert': 2, 'rules': SEQUENCE_PARALLEL}),
    ('mamba', {'tensor': 2, 'stage': 2, 'rules': SEQUENCE_PARALLEL}),
    ('moe', {'tensor': 2, 'expert': 2, 'rules': {'expert': ('expert', 'tensor'), 'mlp': None}}),
    ('moe_capacity', {'expert': 2, 'context': 2}),
    (
      'moe_capacity',
      {'expert': 2, 'tensor': 2, 'rules': {'expert': ('expert', 'tensor'), 'mlp': None}},
    ),
    ('mamba2', {'context': 2, 'tensor': 2}),
    ('latent', {'context': 2, 'tensor': 2}),
    ('relative', {'context': 2, 'tensor': 2}),
    ('window', {'context': 4}),
    ('alibi', {'context': 4, 'tensor': 2}),
    ('prefix', {'context': 4}),
    ('decoder', {'stage': 2, 'stage_rounds': 2}),
    ('decoder', {'stage': 4, 'stage_microbatches': 8, 'data': 1, 'fsdp': 1, 'tensor': 2}),
  ],
  ids=lambda x: x if isinstance(x, str) else '-'.join(x),
)
def test_other_parts_and_rules_change_nothing(name, sizes):
  check(name, **sizes)


SLOW = {True: pytest.mark.slow, False: ()}
RINGS = {
  'causal': {'causal': True},
  'both ways': {'causal': False},
  'prefix': {'causal': True, 'prefix': True},
  'window': {'causal': True, 'window': 20},
}


@pytest.mark.parametrize(
  ('case', 'fused'),
  [
    ('causal', False),
    *(pytest.param(case, True, marks=SLOW[case != 'both ways']) for case in RINGS),
  ],
)
def test_ring_attention_is_attention(case, fused, monkeypatch):
  """With segments, grouped queries, a bias by distance and capped logits, on 4 devices; causal is balanced."""
  monkeypatch.setattr('research.model.kernels.chunks.block_of', lambda *lengths, most: 8)
  knobs = {'scale': 0.3, 'soft_cap': 5.0, **RINGS[case]}
  rng = np.random.default_rng(0)
  length = 64
  shapes = (
    (2, length, 4, 8),
    (2, length, 2, 8),
    (2, length, 2, 6),
    (4, 2 * length - 1),
    (2, length, 4, 6),
  )
  *inputs, weight = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  segments = np.sort(rng.integers(0, 3, (2, length)), axis=1)
  prefix = np.arange(length)[None] < [[30], [11]] if knobs.pop('prefix', False) else None

  def loss(attend):
    return compiled(
      jax.value_and_grad(
        lambda q, k, v, bias: jnp.sum(attend(q, k, v, bias) * weight), (0, 1, 2, 3)
      )
    )(*inputs)

  with Mesh().use(jax.devices()[:1]):
    sight = {'causal': knobs['causal'], 'prefix': prefix, 'window': knobs.get('window')}
    see = visible(segments, segments, (length, length), **sight)
    plain = lambda q, k, v, bias: dot_product.dot_product_attention(
      q, k, v, mask=see, bias=positions.by_place(bias, length)[None], scale=0.3, soft_cap=5.0
    )
    expected = loss(plain)
  with Mesh(context=4, data=2).use():
    where = axes.spec('batch', 'length')
    split = lambda x: None if x is None else jax.sharding.reshard(jnp.asarray(x), where)
    around = lambda q, k, v, bias: jax.sharding.reshard(
      ring.ring_attention(
        *map(split, (q, k, v)), segments=split(segments), prefix=split(prefix), bias=bias,
        interpret=fused, **knobs,
      ),
      jax.P(),
    )  # fmt: skip
    found = loss(around)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE * np.abs(a).max())


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [{'tensor': 2}, {'fsdp': 2, 'tensor': 2}, {'context': 2, 'stage': 2}]
)
def test_microbatches_are_one_batch_on_any_mesh(sizes):
  """Although their numbers of target tokens differ: the mean is over the tokens of the batch."""
  weights = batch_of('decoder')['decoder_loss_weights'].sum(axis=1)
  assert weights[::2].sum() != weights[1::2].sum()
  (_, sums, grads), params = one_device('decoder')
  run = run_of('decoder', microbatches=2, clip=None, optimizer=optax.sgd)
  with Mesh(**{'data': -1, **sizes}).use():
    program, placed = program_of(run, params)
    state = {
      'step': jnp.zeros((), jnp.int32),
      'params': placed,
      'opt': program.optimizer(0.0).init(placed),
    }
    state, scalars = compiled(program.step)(state, hosts.place(batch_of('decoder')), 1.0)
    np.testing.assert_allclose(scalars['loss'], sums['loss'] / sums['weight'], rtol=TOLERANCE)
    tree = zip(*map(jax.tree.leaves, (params, state['params'], grads)), strict=True)
    for before, after, gradient in tree:
      step, expected = before - np.asarray(after), gradient / sums['weight']
      # The difference of two parameters has their rounding.
      np.testing.assert_allclose(
        step,
        expected,
        rtol=0,
        atol=TOLERANCE * np.abs(expected).max() + 2e-7 * np.abs(before).max(),
      )


def test_every_choice_comes_to_its_expert_however_full():
  """All tokens choose the experts of one device: several rounds of all_to_all, and nothing is dropped."""
  make = functools.partial(
    Experts, 8, 8, active=2, mlp=8, activations=(jax.nn.relu,), capacity=None
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 16, 8)).astype(np.float32)
  weights = rng.random((8, 16, 2)).astype(np.float32)
  index = np.broadcast_to(np.array([6, 7]), (8, 16, 2))

  def run(mesh, devices=None):
    with mesh.use(devices):

      def loss(x, weights):
        experts = make(rngs=nnx.Rngs(params=jax.random.key(0)))
        place = lambda y: axes.shard(y, 'batch', None, None)
        return jnp.sum(experts(place(x), place(weights), place(jnp.asarray(index))) ** 2)

      return jax.tree.map(np.asarray, compiled(jax.value_and_grad(loss, (0, 1)))(x, weights))

  expected = run(Mesh(), jax.devices()[:1])
  found = run(Mesh(data=2, expert=4))
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE * np.abs(a).max())


@pytest.mark.parametrize(
  ('stages', 'rounds', 'microbatches', 'bubble'),
  [(4, 1, 8, 3 / 11), (4, 2, 8, 3 / 19), (2, 2, 3, 1 / 7), (2, 1, 2, 1 / 3)],
)
def test_a_pipeline_waits_as_long_as_it_says(stages, rounds, microbatches, bubble):
  """Of the loop that runs: the ticks of the compiled one, and those whose result counts."""

  def block(x, layers, context):
    return x + jnp.sum(layers), {'counts': 1.0}

  mesh = Mesh(data=1, stage=stages, stage_rounds=rounds, stage_microbatches=microbatches)
  with mesh.use(jax.devices()[:stages]):
    schedule = pipeline.schedule_of(2 * stages * rounds)
    layers = pipeline.over_stages(jnp.ones(2 * stages * rounds))
    x = jnp.zeros((microbatches, 1, 1))
    context = Context(positions=jnp.zeros((microbatches, 1), int))
    run = functools.partial(pipeline.pipelined, schedule, block, context=context)
    run = jax.jit(run).lower(layers, x).compile()
    y, penalties = run(layers, x)
  ticks = max(hlo.trip_counts(run.as_text()).values())
  # A penalty is the mean over microbatches, of which every stage computes each once a round.
  busy = float(penalties['counts']) * microbatches / stages
  assert 1 - busy / ticks == pytest.approx(bubble, abs=1e-6)
  assert (schedule.ticks, schedule.bubble) == (ticks, pytest.approx(bubble))
  assert (np.asarray(y) == 2 * stages * rounds).all()


@pytest.mark.parametrize(
  ('sizes', 'says'),
  [
    ({'stage': 4, 'stage_rounds': 2}, r'stage: a stack of 4 layers cannot be cut into 4 stages x 2 rounds'),
    ({'stage': 4, 'stage_microbatches': 2}, r'Mesh\.stage_microbatches: 2 .* fewer than the 4 stages'),
    ({'stage': 2, 'stage_microbatches': 4}, r'stage_microbatches: 4 microbatches of a batch split over 4'),
  ],
)  # fmt: skip
def test_an_impossible_pipeline_is_one_sentence(sizes, says):
  with Mesh(**sizes).use():
    run = run_of('decoder')
    program, params = program_of(run)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of('decoder').items()}
    with pytest.raises(Invalid, match=says):
      jax.eval_shape(program.loss, params, batch)


def test_a_process_asks_its_own_devices_for_their_memory():
  class Device:
    def __init__(self, process_index, stats):
      self.process_index = process_index
      self.stats = stats

    def memory_stats(self):
      if self.process_index:
        raise RuntimeError('MemoryStats is only supported for addressable PjRt devices.')
      return self.stats

  assert hosts.device_bytes([Device(1, {}), Device(0, {'bytes_limit': 7})]) == 7
  assert hosts.device_bytes([Device(0, None)]) is None
