"""Fused attention against the product in XLA, values and gradients in float32.

The kernels for TPUs are run in Python; what cuDNN is asked for is done by jax's own product.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compilation import chips
from research.model import attention, part
from research.model.attention import visible
from research.model.kernels import flash, tiled
from research.model.kernels.dot_product import dot_product_attention
from research.model.positions import by_place
from research.parallel.mesh import Mesh

LENGTH, HEADS, HEAD_DIM = 256, 2, 128
SEGMENTS = np.array([[1] * 100 + [2] * 120 + [0] * 36], np.int32)
PREFIX = np.arange(LENGTH)[None] < 150
CASES = {
  'causal': {'causal': True},
  'both ways': {'causal': False},
  'window': {'causal': True, 'window': 40},
  'packed': {'causal': True, 'segments': SEGMENTS},
  'soft cap': {'causal': True, 'soft_cap': 2.0},
  'groups': {'causal': True, 'kv_heads': 1},
}
# What splash attention has not.
BIAS = {'causal': True, 'bias': True}
TILED = {
  'bias': BIAS,
  'bias, both ways': {**BIAS, 'causal': False},
  'bias, packed, capped, groups': {**BIAS, 'segments': SEGMENTS, 'soft_cap': 2.0, 'kv_heads': 1},
  'bias, prefix, packed': {**BIAS, 'prefix': PREFIX, 'segments': SEGMENTS},
  'prefix, window': {'causal': True, 'prefix': PREFIX, 'window': 140},
  'window both ways': {'causal': False, 'window': 40},
  'sizes of heads': {'causal': True, 'sizes': (192, 128)},
  'narrow heads': {'causal': True, 'sizes': (40, 40), 'window': 130},
  'no whole tiles': {**BIAS, 'causal': False, 'length': 200},
  'no whole tiles, packed': {'causal': False, 'length': 200, 'segments': SEGMENTS[:, :200]},
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_splash_is_the_product(case):
  compare(CASES[case], functools.partial(flash.flash_attention, interpret=True))


# Those that hold every piece of the kernels; the others are slow.
FAST = ('bias, packed, capped, groups', 'bias, prefix, packed', 'no whole tiles, packed')


@pytest.mark.parametrize(
  'case', [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in TILED]
)
def test_tiles_are_the_product(case, monkeypatch):
  monkeypatch.setattr(tiled, 'block_of', lambda *lengths: 128)
  compare(TILED[case], functools.partial(flash.flash_attention, interpret=True))


CUDNN = [case for case in CASES if case != 'soft cap']
CUDNN += ['bias', 'bias, both ways', 'bias, prefix, packed', 'prefix, window']


@pytest.mark.parametrize('case', CUDNN)
def test_what_cudnn_is_asked_for_is_the_product(case):
  def asked(q, k, v, *, segments, prefix, bias, window=None, **knobs):
    sight = tiled.Sight(segments, segments, prefix, bias)
    return flash._cudnn(q, k, v, sight, window=window, implementation='xla', **knobs)

  compare({**CASES, **TILED}[case], asked)


def test_attention_to_another_sequence():
  """114 queries and 300 keys; of the second row's keys the last 100 are padding."""
  shapes = (2, 114, 4, 64), (2, 300, 4, 64), (2, 300, 4, 64), (2, 114, 4, 64)
  keys = jax.random.split(jax.random.key(0), 4)
  *arrays, dy = (jax.random.normal(*x) for x in zip(keys, shapes, strict=True))
  seen = jnp.arange(300)[None] < jnp.array([[300], [200]])

  def kernel(q, k, v):
    segments = seen.astype(jnp.int32)
    return flash.flash_attention(
      q, k, v, key_segments=segments, scale=0.1, causal=False, interpret=True
    )

  def plain(q, k, v):
    return dot_product_attention(q, k, v, mask=seen[:, None, None], scale=0.1)

  same(kernel, plain, arrays, dy)


def test_a_query_that_sees_nothing_has_zeros():
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = [jax.random.normal(key, (1, 128, 1, 8)) for key in keys]
  segments = jnp.where(jnp.arange(128) < 60, 1, 2)[None]

  def total(*arrays):
    y = flash.flash_attention(
      *arrays, segments=segments, key_segments=jnp.ones((1, 128), int), scale=1.0, causal=True,
      interpret=True,
    )  # fmt: skip
    return jnp.sum(jnp.sin(y)), y

  with Mesh(data=1).use(jax.devices()[:1]):
    (dq, *_), y = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays)
  assert np.abs(y[:, :60]).min() > 0
  assert not np.any(y[:, 60:])
  assert not np.any(dq[:, 60:])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
@pytest.mark.parametrize('learns', [True, False])
def test_a_tpu_compiles_the_tiles(learns):
  """T5's bias with a gradient, and one that is fixed, of which no gradient is computed."""
  chips.prepare('v5e:2x2')
  devices, _ = chips.devices_of('v5e:2x2')
  shape = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct((4, 1023), jnp.float32)
  f = lambda q, k, v, bias: flash.flash_attention(
    q, k, v, bias=bias, scale=0.1, causal=True
  ).astype(jnp.float32).sum()  # fmt: skip
  with Mesh(data=1).use(devices[:1]):
    compiled = jax.jit(jax.grad(f, (0, 1, 2, 3) if learns else (0, 1, 2))).lower(*[shape] * 3, bias)
    text = compiled.compile().as_text()
  kernels = re.findall(r'%attention_(\w+)[.\d]* = (\(?)', text)
  of_bias = '(' if learns else ''
  assert set(kernels) == {('forward', '('), ('backward_query', of_bias), ('backward_keys', '(')}


@pytest.mark.parametrize('segments', [None, SEGMENTS])
def test_a_gpu_is_given_cudnns_kernel(segments, monkeypatch):
  """Lowered for a GPU that is not there: forward and backward are cuDNN's."""
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(attention.flash, 'platform', lambda: 'gpu')
  context = part.Context(positions=jnp.arange(LENGTH)[None], segments=segments)
  q = jax.ShapeDtypeStruct((1, LENGTH, 4, 64), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, LENGTH, 2, 64), jnp.bfloat16)
  f = lambda q, k, v: (
    attention.self_attention(q, k, v, context, scale=0.125).astype(jnp.float32).sum()
  )
  with Mesh(data=1).use(jax.devices()[:1]):
    lowered = jax.jit(jax.grad(f, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=('cuda',))
  bias = '' if segments is None else 'ScaleBias'  # which the segments' mask becomes
  names = {f'__cudnn$fmha{bias}Softmax', f'__cudnn$fmha{bias}SoftmaxBackward'}
  assert names == set(re.findall(r'__cudnn\$\w+', lowered.as_text()))


def compare(case, fused):
  options = dict(case)
  length, sizes = options.pop('length', LENGTH), options.pop('sizes', (HEAD_DIM, HEAD_DIM))
  kv_heads, segments = options.pop('kv_heads', HEADS), options.pop('segments', None)
  causal, window = options.pop('causal'), options.pop('window', None)
  has_bias, prefix = options.pop('bias', False), options.pop('prefix', None)
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, heads, size: jax.random.normal(key, (1, length, heads, size))
  arrays = [
    draw(keys[0], HEADS, sizes[0]),
    draw(keys[1], kv_heads, sizes[0]),
    draw(keys[2], kv_heads, sizes[1]),
  ]
  dy = draw(keys[3], HEADS, sizes[1])
  if has_bias:
    arrays.append(jax.random.normal(keys[4], (HEADS, 2 * length - 1)))
  segments, prefix = (None if x is None else jnp.asarray(x) for x in (segments, prefix))
  hides = {'segments': segments, 'prefix': prefix}

  def kernel(q, k, v, bias=None):
    knobs = {'bias': bias, 'scale': 0.1, 'causal': causal, 'window': window}
    return fused(q, k, v, **hides, **knobs, **options)

  def plain(q, k, v, bias=None):
    mask = visible(
      segments, segments, (length, length), causal=causal, prefix=prefix, window=window
    )
    bias = None if bias is None else by_place(bias, length)[None]
    return dot_product_attention(
      q, k, v, mask=mask, bias=bias, scale=0.1, causal=causal and prefix is None, **options
    )

  same(kernel, plain, arrays, dy)


def same(f, g, arrays, dy):
  with Mesh(data=1).use(jax.devices()[:1]):
    got, want = (
      jax.jit(lambda *xs, f=f: (f(*xs), jax.vjp(f, *xs)[1](dy)))(*arrays) for f in (f, g)
    )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
