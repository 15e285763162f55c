"""Fused attention against the product in XLA, values and gradients in float32.

Splash attention is run in Python; what cuDNN is asked for is done by jax's own product.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model import attention, part
from research.model.attention import visible
from research.model.kernels import flash
from research.model.kernels.dot_product import dot_product_attention
from research.parallel.mesh import Mesh

LENGTH, HEADS, HEAD_DIM = 256, 2, 128
SEGMENTS = np.array([[1] * 100 + [2] * 120 + [0] * 36], np.int32)
CASES = {
  'causal': {'causal': True},
  'both ways': {'causal': False},
  'window': {'causal': True, 'window': 40},
  'packed': {'causal': True, 'segments': SEGMENTS},
  'soft cap': {'causal': True, 'soft_cap': 2.0},
  'groups': {'causal': True, 'kv_heads': 1},
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_splash_is_the_product(case):
  compare(case, functools.partial(flash.flash_attention, interpret=True))


@pytest.mark.parametrize('case', [case for case in CASES if case != 'soft cap'])
def test_what_cudnn_is_asked_for_is_the_product(case):
  def asked(q, k, v, *, segments, window=None, **knobs):
    return flash._cudnn(q, k, v, segments, window=window, implementation='xla', **knobs)

  compare(case, asked)


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
  options = dict(CASES[case])
  kv_heads, segments = options.pop('kv_heads', HEADS), options.pop('segments', None)
  causal, window = options.pop('causal'), options.pop('window', None)
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, heads: jax.random.normal(key, (1, LENGTH, heads, HEAD_DIM))
  arrays = draw(keys[0], HEADS), draw(keys[1], kv_heads), draw(keys[2], kv_heads)
  dy = draw(keys[3], HEADS)
  segments = None if segments is None else jnp.asarray(segments)

  def kernel(q, k, v):
    return fused(q, k, v, segments=segments, scale=0.1, causal=causal, window=window, **options)

  def plain(q, k, v):
    mask = visible(segments, segments, (LENGTH, LENGTH), causal=causal, window=window)
    return dot_product_attention(q, k, v, mask=mask, scale=0.1, causal=causal, **options)

  with Mesh(data=1).use(jax.devices()[:1]):
    got, want = (
      jax.jit(lambda *xs, f=f: (f(*xs), jax.vjp(f, *xs)[1](dy)))(*arrays) for f in (kernel, plain)
    )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
