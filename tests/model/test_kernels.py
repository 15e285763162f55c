"""The attention product against its definition in numpy, float64, values and gradients."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model.attention import visible
from research.model.kernels import dot_product
from research.model.kernels.dot_product import dot_product_attention
from research.parallel.axes import shard
from research.parallel.mesh import Mesh


def reference(q, k, v, dy, *, mask, bias, scale, soft_cap):
  """y and the gradients of sum(y dy) by q, k, v and bias, in float64, one head at a time."""
  q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
  batch, _length, heads, _ = q.shape
  group = heads // k.shape[2]
  y, dq, dk, dv = np.zeros_like(dy), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  d_bias = None if bias is None else np.zeros(bias.shape)
  for b, h in itertools.product(range(batch), range(heads)):
    g = h // group
    raw = scale * q[b, :, h] @ k[b, :, g].T
    capped = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    s = capped if bias is None else capped + np.asarray(bias, np.float64)[b % len(bias), h]
    see = np.ones(s.shape, bool) if mask is None else np.asarray(mask)[b % len(mask), 0]
    e = np.where(see, np.exp(s - np.max(s, axis=-1, keepdims=True)), 0)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    y[b, :, h] = p @ v[b, :, g]
    dp = dy[b, :, h] @ v[b, :, g].T
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    if d_bias is not None:
      d_bias[b % len(bias), h] += ds
    ds = ds if soft_cap is None else ds * (1 - (capped / soft_cap) ** 2)
    dq[b, :, h] = scale * ds @ k[b, :, g]
    dk[b, :, g] += scale * ds.T @ q[b, :, h]
    dv[b, :, g] += p.T @ dy[b, :, h]
  return y, (dq, dk, dv, d_bias)


def inputs(length=(64, 64), heads=4, kv_heads=4, bias_batch=0, batch=2):
  keys = iter(jax.random.split(jax.random.key(0), 5))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  q, dy = draw(batch, length[0], heads, 8), draw(batch, length[0], heads, 8)
  k, v = draw(batch, length[1], kv_heads, 8), draw(batch, length[1], kv_heads, 8)
  return q, k, v, dy, draw(bias_batch, heads, *length) if bias_batch else None


def ours(q, k, v, dy, bias, **options):
  call = lambda q, k, v, bias: dot_product_attention(q, k, v, bias=bias, **options)
  y, vjp = jax.vjp(call, q, k, v, bias)
  return y, vjp(dy)


def agree(got, want, tolerance=2e-6):
  """Within `tolerance` of the largest entry: float32 sums of about 64 terms."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


SEGMENTS = jnp.asarray([[1] * 20 + [2] * 44, [1] * 40 + [0] * 24])
CASES = {
  'plain': ({}, {}),
  'bias of all rows': ({'bias_batch': 1}, {}),
  'bias of each row': ({'bias_batch': 2, 'kv_heads': 2}, {}),
  'soft cap': ({'bias_batch': 1}, {'soft_cap': 1.5}),
  'one key head': ({'kv_heads': 1}, {}),
  'cross': ({'length': (48, 80)}, {}),
  # A CPU computes the logits of one query by another product than those of several.
  'one query': ({'length': (1, 80), 'kv_heads': 2, 'bias_batch': 2}, {'soft_cap': 1.5}),
  'two queries': ({'length': (2, 80), 'kv_heads': 2, 'bias_batch': 2}, {'soft_cap': 1.5}),
  'causal': ({}, {'causal': True}),
  'causal, groups, bias, cap': (
    {'kv_heads': 2, 'bias_batch': 1},
    {'causal': True, 'soft_cap': 2.0},
  ),
  'packed': ({'bias_batch': 2}, {'causal': True, 'segments': SEGMENTS}),
  'window': ({}, {'causal': True, 'window': 5}),
}


@pytest.mark.parametrize('at_once', [dot_product.LOGITS_AT_ONCE, 1])
@pytest.mark.parametrize('case', CASES)
def test_product_is_its_definition(case, at_once, monkeypatch):
  monkeypatch.setattr(dot_product, 'LOGITS_AT_ONCE', at_once)  # 1: a row of the batch at a time
  shapes, options = CASES[case]
  q, k, v, dy, bias = inputs(**shapes)
  segments, window = options.get('segments'), options.get('window')
  causal, soft_cap = options.get('causal', False), options.get('soft_cap')
  mask = visible(segments, segments, (q.shape[1], k.shape[1]), causal=causal, window=window)
  same = {'mask': mask, 'scale': 0.3, 'soft_cap': soft_cap}
  with Mesh(data=1).use(jax.devices()[:1]):
    got = jax.jit(lambda *xs: ours(*xs, causal=causal, **same))(q, k, v, dy, bias)
  agree(got, reference(q, k, v, dy, bias=bias, **same))


def test_as_many_rows_as_fit_are_computed_at_once(monkeypatch):
  """Four rows have two at a time, or all where two are small; other platforms have all."""

  def rows():
    query = jnp.zeros((4, 8, 2, 1, 16))
    with Mesh(data=1).use(jax.devices()[:1]):
      return dot_product._rows_at_once(query, jnp.zeros((4, 8, 2, 16)))

  logits_of_row = 8 * 2 * 8
  found = {}
  for at_once in (1, logits_of_row, 3 * logits_of_row, 5 * logits_of_row):
    monkeypatch.setattr(dot_product, 'LOGITS_AT_ONCE', at_once)
    found[at_once] = rows()
  assert list(found.values()) == [1, 1, 2, 4]
  monkeypatch.setattr(dot_product, 'LOGITS_AT_ONCE', 1)
  monkeypatch.setattr(dot_product, 'on_one_cpu', lambda: False)
  assert rows() == 4


def test_without_a_gradient_all_rows_are_computed_at_once(monkeypatch):
  """An answer of the engine must not depend on how many are read together, not even in its last bit."""
  monkeypatch.setattr(dot_product, 'LOGITS_AT_ONCE', 1)
  q, k, v, *_ = inputs()
  with Mesh(data=1).use(jax.devices()[:1]):
    call = lambda q, k, v: dot_product_attention(q, k, v, scale=0.3)
    assert 'while' not in jax.jit(call).lower(q, k, v).as_text()


def test_rows_with_a_bias_of_all_or_of_each(monkeypatch):
  """Two rows of four at a time: the gradient of one bias is the sum over both pairs."""
  monkeypatch.setattr(dot_product, 'LOGITS_AT_ONCE', 2 * 4 * 64 * 64)
  for bias_batch in (1, 4):
    q, k, v, dy, bias = inputs(batch=4, bias_batch=bias_batch)
    options = {'mask': None, 'scale': 0.3, 'soft_cap': None}
    with Mesh(data=1).use(jax.devices()[:1]):
      program = jax.jit(lambda *xs, options=options: ours(*xs, **options))
      assert 'while' in program.lower(q, k, v, dy, bias).as_text()
      got = program(q, k, v, dy, bias)
    agree(got, reference(q, k, v, dy, bias=bias, **options))


def test_a_query_that_sees_nothing_is_zero_and_moves_nothing():
  q, k, v, dy, bias = inputs(bias_batch=2)
  mask = np.tri(64, dtype=bool)[None, None].repeat(2, axis=0)
  mask[0, 0, 7] = mask[1, 0, 40:] = False
  same = {'mask': jnp.asarray(mask), 'scale': 1.0, 'soft_cap': None}
  with Mesh(data=1).use(jax.devices()[:1]):
    got = ours(q, k, v, dy, bias, **same, causal=True)
  agree(got, reference(q, k, v, dy, bias=bias, **same))
  assert not np.any(got[0][1, 40:])
  assert not np.any(got[1][0][1, 40:])


def test_large_logits_neither_overflow_nor_vanish():
  q, k, v, dy, _ = inputs()
  same = {'mask': None, 'scale': 100.0, 'soft_cap': None}
  with Mesh(data=1).use(jax.devices()[:1]):
    y, grads = ours(q, k, v, dy, None, **same)
  want_y, want = reference(q, k, v, dy, bias=None, **same)
  agree(y, want_y, 1e-3)  # a logit of 1e3 has an error of 1e-4 in float32
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert np.abs(want[2]).max() > 0.1


def test_bfloat16_is_within_its_rounding():
  q, k, v, dy, _ = (None if x is None else x.astype(jnp.bfloat16) for x in inputs(kv_heads=2))
  same = {'mask': visible(None, None, (64, 64), causal=True), 'scale': 0.3, 'soft_cap': None}
  with Mesh(data=1).use(jax.devices()[:1]):
    got = ours(q, k, v, dy, None, causal=True, **same)
  assert got[0].dtype == jnp.bfloat16
  got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
  agree(got, reference(q, k, v, dy, bias=None, **same), 2e-2)


@pytest.mark.parametrize('queries', [64, 1])
@pytest.mark.parametrize('kv_heads', [4, 1])
def test_a_mesh_changes_nothing(kv_heads, queries):
  q, k, v, dy, bias = inputs((queries, 64), kv_heads=kv_heads, bias_batch=1, batch=4)
  same = {'mask': visible(None, None, (queries, 64), causal=True), 'scale': 0.3, 'soft_cap': None}
  with Mesh(data=2, fsdp=2, tensor=2).use():
    place = lambda x, axis: shard(x, 'batch', None, axis, None)
    arrays = place(q, 'heads'), place(k, 'kv_heads'), place(v, 'kv_heads'), place(dy, 'heads')
    got = jax.jit(lambda *xs: ours(*xs, causal=True, **same))(
      *arrays, shard(bias, None, 'heads', None, None)
    )
    assert jax.typeof(got[1][1]).sharding.spec == jax.typeof(arrays[1]).sharding.spec
  agree(jax.device_get(got), reference(q, k, v, dy, bias=bias, **same))


def program(queries: int, slots: int = 96, head_dim: int = 16):
  """Attention of one row, lowered; keys and values are stored [rows, kv_heads, slots, head_dim]."""

  def attend(query, key, value):
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    return dot_product_attention(query, key, value, scale=0.3)

  query = jax.ShapeDtypeStruct((1, queries, 6, head_dim), jnp.float32)
  stored = jax.ShapeDtypeStruct((1, 3, slots, head_dim), jnp.float32)
  with Mesh(data=1).use(jax.devices()[:1]):
    return jax.jit(attend).lower(query, stored, stored)


def test_the_keys_of_one_query_are_not_transposed(monkeypatch):
  """No array of the program is [..., head_dim, slots]. The form of other platforms has one, here on a CPU."""
  transposed = re.compile(r'f32\[(?:\d+,)*16,96\]')
  assert not transposed.search(program(queries=1).compile().as_text())
  monkeypatch.setattr(dot_product, 'platform', lambda: 'tpu')
  assert transposed.search(program(queries=1).compile().as_text())


def test_only_one_query_on_a_cpu_has_another_program(monkeypatch):
  ours = {queries: program(queries).as_text() for queries in (1, 2, 64)}
  monkeypatch.setattr(dot_product, 'platform', lambda: 'tpu')
  theirs = {queries: program(queries).as_text() for queries in ours}
  assert [queries for queries in ours if ours[queries] != theirs[queries]] == [1]


def test_the_causal_half_that_is_not_computed_costs_nothing():
  q, k, v, *_ = inputs(length=(512, 512))
  mask = visible(None, None, (512, 512), causal=True)
  flops = {}
  with Mesh(data=1).use(jax.devices()[:1]):
    for causal in (False, True):
      call = lambda q, k, v, causal=causal: dot_product_attention(
        q, k, v, mask=mask, scale=1.0, causal=causal
      )
      flops[causal] = jax.jit(call).lower(q, k, v).compile().cost_analysis()['flops']
  assert flops[True] < 0.8 * flops[False]  # three quarters, and some elementwise work
