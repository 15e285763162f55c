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
  codes = form.encode(x / scale)
  packed = form.pack(codes, 1)
  assert packed.shape == (3, 8 // form.per_byte, 5)
  assert packed.dtype == form.dtype
  np.testing.assert_array_equal(form.unpack(packed, 1), codes)
  on_jax = form.encode(jnp.asarray(x) / scale)
  np.testing.assert_array_equal(on_jax, codes)
  np.testing.assert_array_equal(form.unpack(form.pack(on_jax, 1), 1), codes)
  np.testing.assert_array_equal(form.decode(jnp.asarray(codes)), form.decode(codes))


@pytest.mark.parametrize('name', INTEGERS)
@pytest.mark.parametrize('zeros', [False, True])
def test_a_whole_number_is_at_most_half_a_step_off(name, zeros):
  form, x = formats.FORMATS[name], numbers(16, 4) + 0.5
  scale, zero = form.scales(x, (0,), zeros)
  rounded = form.round_trip(x, (0,), zeros)
  # With a zero point both ends may move by the half step that the zero point is rounded by.
  assert np.all(np.abs(rounded - x) <= (1.0 if zeros else 0.5) * scale * 1.0001)
  if zeros:
    assert np.all((zero >= 0) & (zero < 2**form.bits))
  assert len(np.unique(form.encode(x / scale, zero))) <= 2**form.bits


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
