"""Numbers of few bits: the values of a format, rounding a matrix to them, packing them in bytes.

A matrix is rounded in groups that share a scale: w = scale x value of a code. With a zero point a whole number
is w = scale x (code - zero). Everything here works on numpy and on jax arrays alike, so that training, rounding
after training and decoding share one definition.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

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
  def dtype(self):
    """The type of stored codes: int8 for int8, so that a product can read it, and uint8 for all others."""
    return np.int8 if self.name == 'int8' else np.uint8

  @property
  def top(self) -> float:
    """The largest value of a code without a zero point; the scale is the largest magnitude over this value."""
    if self.is_integer:
      return 2 ** (self.bits - 1) - 1
    return 1.0 if self.name == 'nf4' else float(ml_dtypes.finfo(FLOATS[self.name]).max)

  def encode(self, x, zero=None):
    """The nearest codes of x, which is the matrix over its scale.

    Args:
      x: float32.
      zero: the code that stands for 0, of a shape that broadcasts; None where there is none.

    Returns:
      int8 of int8 without a zero point, else uint8.
    """
    xp = namespace(x)
    if self.is_integer and zero is not None:
      return xp.clip(xp.round(x + zero), 0, 2**self.bits - 1).astype(np.uint8)
    if self.is_integer:
      code = xp.clip(xp.round(x), -self.top, self.top)
      return code.astype(np.int8) if self.bits == 8 else (code + self.top + 1).astype(np.uint8)
    x = xp.clip(x, -self.top, self.top)
    if self.name == 'nf4':
      middles = (NF4[1:] + NF4[:-1]) / 2
      return xp.searchsorted(xp.asarray(middles), x).astype(np.uint8)
    if xp is np:
      return x.astype(FLOATS[self.name]).view(np.uint8)
    return jax.lax.bitcast_convert_type(x.astype(FLOATS[self.name]), jnp.uint8)

  def decode(self, codes, zero=None):
    """The float32 values of codes, to be multiplied by the scale; arguments as of `encode`."""
    xp = namespace(codes)
    if self.is_integer and zero is not None:
      return codes.astype(np.float32) - zero
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

  def scales(self, x, axes: tuple[int, ...], zeros: bool = False):
    """The scale and the zero point (or None) of groups.

    Args:
      x: float32.
      axes: the axes over which a group extends.
      zeros: whether there is a zero point; the codes then range from the smallest to the largest number.

    Returns:
      Both float32, of the shape of x with 1 in place of `axes`; zero points are whole.
    """
    xp = namespace(x)
    if not zeros:
      largest = xp.max(xp.abs(x), axis=axes, keepdims=True)
      return xp.where(largest > 0, largest / self.top, 1).astype(np.float32), None
    # 0 is within the range, so that it has a code.
    low = xp.minimum(xp.min(x, axis=axes, keepdims=True), 0)
    high = xp.maximum(xp.max(x, axis=axes, keepdims=True), 0)
    steps = 2**self.bits - 1
    scale = xp.where(high > low, (high - low) / steps, 1).astype(np.float32)
    return scale, xp.clip(xp.round(-low / scale), 0, steps).astype(np.float32)

  def round_trip(self, x, axes: tuple[int, ...], zeros: bool = False):
    """x rounded to the format; arguments as of `scales`."""
    scale, zero = self.scales(x, axes, zeros)
    return self.decode(self.encode(x / scale, zero), zero) * scale

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


def knob_format(owner: type, field: str, name: str | int, zeros: bool = False) -> Format:
  """The format that a knob of a class names.

  Args:
    owner, field: the class and its knob, for the message.
    name: as of `format_of`.
    zeros: whether the class wants a zero point for each group.

  Raises:
    Invalid: there is no such format, or it has no zero points.
  """
  try:
    form = format_of(name)
  except UserError as error:
    raise Invalid(owner, field, str(error)) from None
  if zeros and not form.is_integer:
    raise Invalid(owner, 'zeros', f'{form.name} has no zero point; only whole numbers have.')
  return form


def namespace(x):
  """numpy for numpy's arrays, jax.numpy for all others."""
  return np if isinstance(x, np.ndarray | np.generic) else jnp


def group_size(size: int, largest: int | None) -> int:
  """The largest divisor of an axis's size that is at most `largest`; None is the whole axis."""
  if largest is None:
    return size
  return next(n for n in range(min(size, largest), 0, -1) if size % n == 0)
