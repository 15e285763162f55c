"""Numbers of few bits: rounding, packing, and the same on numpy as on jax."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research.core.errors import UserError
from research.quantisation import formats

INTEGERS = [name for name, form in formats.FORMATS.items() if form.is_integer]


def numbers(*shape) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('name', formats.FORMATS)
def test_packing_is_undone_and_numpy_is_jax(name):
  form, x = formats.FORMATS[name], numbers(3, 8, 5)
  scale, _ = form.scales(x, (1,))
  codes = form.encode(x, scale)
  packed = form.pack(codes, 1)
  assert packed.shape == (3, 8 // form.per_byte, 5)
  # A product of whole numbers reads the codes of int8.
  assert packed.dtype == (np.int8 if name == 'int8' else np.uint8)
  np.testing.assert_array_equal(form.unpack(packed, 1), codes)
  on_jax = form.encode(jnp.asarray(x), scale)
  np.testing.assert_array_equal(on_jax, codes)
  np.testing.assert_array_equal(form.unpack(form.pack(on_jax, 1), 1), codes)
  on_jax = form.decode(jnp.asarray(codes), scale)
  np.testing.assert_allclose(on_jax, form.decode(codes, scale), rtol=1e-7)


@pytest.mark.parametrize('name', INTEGERS)
@pytest.mark.parametrize('offsets', [False, True])
def test_a_whole_number_is_at_most_half_a_step_off(name, offsets):
  form, x = formats.FORMATS[name], numbers(16, 4) + 0.5
  scale, offset = form.scales(x, (0,), offsets)
  rounded = form.round_trip(x, (0,), offsets)
  # Both ends may move by the rounding of scale and offset to float16, which is 2^-11 of a number.
  end = 2**-11 * (np.abs(x).max(axis=0) + 2**form.bits * scale) if offsets else 0
  assert np.all(np.abs(rounded - x) <= 0.5001 * scale + end)
  assert len(np.unique(form.encode(x, scale, offset))) <= 2**form.bits
  if offsets:
    assert scale.dtype == offset.dtype == np.float16


def test_an_offset_is_that_of_llama_cpp():
  """Q4_1 of the package gguf: the same numbers, of which the ends have the codes 0 and 15."""
  gguf = pytest.importorskip('gguf')
  x = numbers(6, 32) + 0.3
  packed = gguf.quantize(x, gguf.GGMLQuantizationType.Q4_1)
  reference = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
  rounded = formats.FORMATS['int4'].round_trip(x, (1,), True)
  step = (x.max(axis=1) - x.min(axis=1)) / 15
  # gguf divides by the step that is not rounded to float16 yet, so a number in the middle of two codes may go
  # either way.
  assert np.mean(rounded != reference) < 0.03
  assert np.all(np.abs(rounded - reference) <= 1.001 * step[:, None])


@pytest.mark.parametrize('name', formats.FORMATS)
def test_rounding_twice_is_rounding_once(name):
  form = formats.FORMATS[name]
  once = form.round_trip(numbers(32, 4), (0,))
  np.testing.assert_allclose(form.round_trip(once, (0,)), once, rtol=1e-6, atol=1e-7)
  zero = np.zeros((4, 3), np.float32)
  np.testing.assert_array_equal(form.round_trip(zero, (0,)), zero)


def test_nf4_is_bitsandbytes_own():
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes.functional')
  x = numbers(8, 64)
  values, state = bnb.quantize_4bit(torch.tensor(x), blocksize=64, quant_type='nf4')
  reference = bnb.dequantize_4bit(values, state).numpy()
  np.testing.assert_allclose(formats.FORMATS['nf4'].round_trip(x, (1,)), reference, atol=1e-6)


def test_int8_is_qwix_own():
  qwix = pytest.importorskip('qwix')
  x = numbers(64, 8)
  quantised = qwix.quantize(jnp.asarray(x), jnp.int8, channelwise_axes=(1,))
  np.testing.assert_allclose(
    formats.FORMATS['int8'].round_trip(x, (0,)), qwix.dequantize(quantised), atol=1e-6
  )


def test_fp8_is_the_nearest_of_the_type():
  x = numbers(100) * 10
  form = formats.FORMATS['fp8_e4m3']
  reference = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
  np.testing.assert_array_equal(form.decode(form.encode(x)), reference)
  # Beyond the largest number there is only the largest number.
  assert form.decode(form.encode(np.array([1e6], np.float32))) == 448


def test_a_number_of_bits_is_a_format_and_a_wrong_name_is_told():
  assert formats.format_of(3).name == 'int3'
  with pytest.raises(UserError, match=r"'int9'.*Did you mean"):
    formats.format_of(9)


@pytest.mark.parametrize(
  ('size', 'largest', 'group'), [(576, 128, 96), (64, 128, 64), (7, None, 7)]
)
def test_groups_divide_the_axis(size, largest, group):
  assert formats.group_size(size, largest) == group
