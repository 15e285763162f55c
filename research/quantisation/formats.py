"""Numbers of few bits: the values of a format, rounding a matrix to them, packing them in bytes.

A matrix is rounded in groups that share a scale: w = scale x value of a code. With an offset for each group,
whole numbers count from 0: w = scale x code + offset, as in Q4_1 of llama.cpp. The offset is no whole number of
steps, so that the codes reach from the smallest to the largest number of the group. Scale and offset are then
float16, which is less memory than a float32 scale with a whole zero point.

Everything here works on numpy and on jax arrays alike, so that training, rounding after training and decoding
share one definition.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from research.core.divisors import largest_divisor
from research.core.errors import Invalid, UserError, did_you_mean

# The 16 values of NF4: quantiles of a normal distribution, with an exact 0 (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E), as bitsandbytes has them.
NF4 = np.array(
  [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
   -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
   0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
   0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
FLOATS = {'fp8_e4m3': ml_dtypes.float8_e4m3fn, 'fp8_e5m2': ml_dtypes.float8_e5m2}


@dataclasses.dataclass(frozen=True)
class Format:
  """A format of numbers.

  Attributes:
    name: 'int2' to 'int8', 'nf4', 'fp8_e4m3' or 'fp8_e5m2'.
    bits: the size of a number.
  """

  name: str
  bits: int

  @property
  def is_integer(self) -> bool:
    return self.name.startswith('int')

  @property
  def per_byte(self) -> int:
    """How many codes a byte packs. Codes of 3 bits take 4, codes of 5 to 7 bits take 8."""
    return 1 if self.bits > 4 else 2 if self.bits > 2 else 4

  @property
  def top(self) -> float:
    """The largest value of a code without an offset; the scale is the largest magnitude over this value."""
    if self.is_integer:
      return 2 ** (self.bits - 1) - 1
    return 1.0 if self.name == 'nf4' else float(ml_dtypes.finfo(FLOATS[self.name]).max)

  def encode(self, x, scale=1.0, offset=None):
    """The codes of the numbers that are nearest to x.

    Args:
      x: the matrix.
      scale, offset: of every number, of shapes that broadcast; the offset is None where there is none.

    Returns:
      int8 of int8 without offsets, so that a product of whole numbers can read it; else uint8.
    """
    xp = namespace(x)
    x = _float32(x)
    if offset is not None:
      x = (x - _float32(offset)) / _float32(scale)
      return xp.clip(xp.round(x), 0, 2**self.bits - 1).astype(np.uint8)
    x = xp.clip(x / _float32(scale), -self.top, self.top)
    if self.is_integer:
      code = xp.round(x)
      return code.astype(np.int8) if self.bits == 8 else (code + self.top + 1).astype(np.uint8)
    if self.name == 'nf4':
      middles = (NF4[1:] + NF4[:-1]) / 2
      return xp.searchsorted(xp.asarray(middles), x).astype(np.uint8)
    if xp is np:
      return x.astype(FLOATS[self.name]).view(np.uint8)
    return jax.lax.bitcast_convert_type(x.astype(FLOATS[self.name]), jnp.uint8)

  def decode(self, codes, scale=1.0, offset=None):
    """The float32 numbers that codes stand for; arguments as of `encode`."""
    if offset is not None:
      # A float16 scale times a code of at most 8 bits is exact, so that fused or not, this is one number.
      return codes.astype(np.float32) * _float32(scale) + _float32(offset)
    return self._values(codes) * _float32(scale)

  def _values(self, codes):
    """The float32 values of codes without scale and offset."""
    xp = namespace(codes)
    if self.is_integer:
      values = codes.astype(np.float32)
      return values if self.bits == 8 else values - (self.top + 1)
    if self.name == 'nf4':
      # A sum over the 16 values in place of a look-up, which a TPU would do element by element.
      if xp is np:
        return NF4[codes]
      return sum(jnp.where(codes == i, value, 0) for i, value in enumerate(NF4))
    if xp is np:
      return codes.view(FLOATS[self.name]).astype(np.float32)
    return jax.lax.bitcast_convert_type(codes, FLOATS[self.name]).astype(jnp.float32)

  def scales(self, x, axes: tuple[int, ...], offsets: bool = False):
    """The scale and the offset (or None) of groups.

    Args:
      x: float32.
      axes: the axes over which a group extends.
      offsets: whether there are offsets; the codes then range from the smallest to the largest number.

    Returns:
      Both of the shape of x with 1 in place of `axes`: a float32 scale alone, or both in float16.
    """
    xp = namespace(x)
    if not offsets:
      largest = xp.max(xp.abs(x), axis=axes, keepdims=True)
      return xp.where(largest > 0, largest / self.top, 1).astype(np.float32), None
    low = xp.min(x, axis=axes, keepdims=True)
    high = xp.max(x, axis=axes, keepdims=True)
    scale = ((high - low) / (2**self.bits - 1)).astype(np.float16)
    return xp.where(scale > 0, scale, 1).astype(np.float16), low.astype(np.float16)

  def round_trip(self, x, axes: tuple[int, ...], offsets: bool = False):
    """x rounded to the format; arguments as of `scales`."""
    scale, offset = self.scales(x, axes, offsets)
    return self.decode(self.encode(x, scale, offset), scale, offset)

  def pack(self, codes, axis: int):
    """Codes of fewer than 5 bits, several to a byte along an axis, the first in the lowest bits."""
    n = self.per_byte
    if n == 1:
      return codes
    width = 8 // n
    axis %= codes.ndim
    split = codes.reshape(*codes.shape[:axis], -1, n, *codes.shape[axis + 1 :])
    parts = [split.take(i, axis=axis + 1) << np.uint8(width * i) for i in range(n)]
    return sum(parts[1:], parts[0])

  def unpack(self, packed, axis: int):
    """The inverse of `pack`."""
    n = self.per_byte
    if n == 1:
      return packed
    xp = namespace(packed)
    width = 8 // n
    axis %= packed.ndim
    mask = np.uint8(2**width - 1)
    parts = [(packed >> np.uint8(width * i)) & mask for i in range(n)]
    codes = xp.stack(parts, axis=axis + 1)
    return codes.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


FORMATS = {f'int{bits}': Format(f'int{bits}', bits) for bits in range(2, 9)}
FORMATS |= {'nf4': Format('nf4', 4), **{name: Format(name, 8) for name in FLOATS}}


def format_of(name: str | int) -> Format:
  """The format of a name; a number of bits n means 'int<n>'.

  Raises:
    UserError: no format has this name.
  """
  name = f'int{name}' if isinstance(name, int) else name
  if name not in FORMATS:
    raise UserError(f'no format of numbers {name!r}.{did_you_mean(name, FORMATS)}')
  return FORMATS[name]


def knob_format(owner: type, field: str, name: str | int, offsets: bool = False) -> Format:
  """The format that a knob of a class names.

  Args:
    owner, field: the class and its knob, for the message.
    name: as of `format_of`.
    offsets: whether the class wants an offset for each group.

  Raises:
    Invalid: there is no such format, or it has no offsets.
  """
  try:
    form = format_of(name)
  except UserError as error:
    raise Invalid(owner, field, str(error)) from None
  if offsets and not form.is_integer:
    raise Invalid(owner, 'offsets', f'{form.name} has no offsets; only whole numbers have.')
  return form


def _float32(x):
  """x in float32; the scale 1 of a format without groups is a number of Python."""
  return x if isinstance(x, float) else x.astype(np.float32)


def namespace(x):
  """numpy for numpy's arrays, jax.numpy for all others."""
  return np if isinstance(x, np.ndarray | np.generic) else jnp


def group_size(size: int, largest: int | None) -> int:
  """The largest divisor of an axis's size that is at most `largest`; None is the whole axis."""
  return size if largest is None else largest_divisor(size, largest)
