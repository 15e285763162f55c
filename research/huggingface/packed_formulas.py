"""The formulas of packed weights: the float32 matrices [out, in] that the tensors of a format stand for.

Each takes `get`, which returns a tensor by its ending and knows which endings there are (`packed.Suffixes`).
"""

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np

# AWQ packs eight columns into one int32 in this order, because its CUDA kernel unpacks them so.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_bits(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
  """Returns the numbers of `bits` bits in int32 words along `axis`, lowest bits first.

  A number may cross from one word to the next.

  Args:
    words: int32. Bits that are left over at the end are dropped.
    bits: 1 to 8.
    axis: the axis of the words, which becomes longer.

  Returns:
    uint8.
  """
  words = np.ascontiguousarray(np.moveaxis(np.asarray(words), axis, -1))
  stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder='little')
  count = stream.shape[-1] // bits
  grouped = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
  numbers = np.packbits(grouped, axis=-1, bitorder='little')[..., 0]
  return np.moveaxis(numbers, -1, axis)


def gptq(get: Callable[[str], np.ndarray], bits: int, plus_one: bool) -> np.ndarray:
  """GPTQ in 2, 3, 4 or 8 bits: (q - zero) scale, float32 [out, in].

  Args:
    get: a tensor by its suffix: qweight int32 [in x bits / 32, out], qzeros int32 [groups, out x bits / 32],
      scales [groups, out], and g_idx int32 [in], the group of every row.
    bits: of a number.
    plus_one: whether zero points are stored less one, as GPTQ's first format does.
  """
  numbers = unpack_bits(get('qweight'), bits, axis=0).astype(np.float32)
  zeros = unpack_bits(get('qzeros'), bits, axis=1).astype(np.float32)
  if plus_one:
    zeros = (zeros + 1) % 2**bits
  scales = np.asarray(get('scales')).astype(np.float32)
  rows, groups = len(numbers), len(scales)
  group_of = np.asarray(get('g_idx')) if get.has('g_idx') else np.arange(rows) * groups // rows
  zeros = zeros[:, : scales.shape[1]]
  return ((numbers - zeros[group_of]) * scales[group_of]).T


def stores_zeros_less_one(qzeros: np.ndarray, bits: int, symmetric: bool, label: str) -> bool:
  """Whether a GPTQ file has the first format, whose zero points are stored less one.

  The label of a file is often wrong. A symmetric zero point is the middle of the range (8 with 4 bits), so that
  a stored 7 or 8 tells the formats apart. Only for an asymmetric file the label decides.
  """
  middle = 2 ** (bits - 1)
  if symmetric:
    stored = np.unique(unpack_bits(qzeros, bits, axis=1)).tolist()
    if stored == [middle - 1]:
      return True
    if stored == [middle]:
      return False
  return label != 'gptq_v2'


def awq(get: Callable[[str], np.ndarray]) -> np.ndarray:
  """AWQ in 4 bits: (q - zero) scale, float32 [out, in].

  Args:
    get: a tensor by its suffix: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales
      [groups, out].
  """
  numbers = _in_order(unpack_bits(get('qweight'), 4, axis=1)).astype(np.float32)
  zeros = _in_order(unpack_bits(get('qzeros'), 4, axis=1)).astype(np.float32)
  scales = np.asarray(get('scales')).astype(np.float32)
  rows_per_group = len(numbers) // len(scales)
  zeros = np.repeat(zeros, rows_per_group, axis=0)
  scales = np.repeat(scales, rows_per_group, axis=0)
  return ((numbers - zeros) * scales).T


def _in_order(numbers: np.ndarray) -> np.ndarray:
  """The columns of AWQ, eight of which lie in a word in the order of `AWQ_ORDER`."""
  split = numbers.reshape(len(numbers), -1, 8)
  ordered = np.empty_like(split)
  ordered[..., list(AWQ_ORDER)] = split
  return ordered.reshape(numbers.shape)


def bitsandbytes_4bit(get: Callable[[str], np.ndarray], kind: str) -> np.ndarray:
  """bitsandbytes' nf4 or fp4: a code book times the largest magnitude of each block, float32 [out, in].

  Args:
    get: a tensor by its suffix: the packed weight uint8 [n / 2, 1] under '', absmax, quant_map float32
      [16], nested_absmax and nested_quant_map where the magnitudes are quantised too, and quant_state.
    kind: 'nf4' or 'fp4'.
  """
  state = json.loads(bytes(np.asarray(get(f'quant_state.bitsandbytes__{kind}'))))
  nested = None
  if get.has('nested_absmax'):
    size, offset = state['nested_blocksize'], state['nested_offset']
    nested = get('nested_quant_map'), get('nested_absmax'), size, offset
  return nested_blocks(
    get(''), get('quant_map'), get('absmax'), state['blocksize'], state['shape'], nested
  )


def nested_blocks(
  packed, book, magnitudes, blocksize: int, shape, nested: tuple | None = None
) -> np.ndarray:
  """bitsandbytes' blocks of 4 bits: book[code] times the largest magnitude of the block, of this shape.

  Args:
    packed: uint8, two codes each, the first in the high bits.
    book: the 16 values.
    magnitudes: of the blocks; codes themselves where `nested` is there.
    blocksize: numbers of a block.
    nested: (book, magnitudes, blocksize, offset) of the magnitudes.
  """
  packed = np.asarray(packed).reshape(-1)
  codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
  magnitudes = np.asarray(magnitudes).reshape(-1)
  if nested is not None:
    nested_book, nested_magnitudes, nested_size, offset = nested
    scales = np.repeat(np.asarray(nested_magnitudes, np.float32).reshape(-1), nested_size)
    values = np.asarray(nested_book, np.float32)[magnitudes]
    magnitudes = values * scales[: len(magnitudes)] + np.float32(offset)
  blocks = np.repeat(magnitudes.astype(np.float32), blocksize)
  size = int(np.prod(shape))
  values = np.asarray(book, np.float32)[codes]
  return (values[:size] * blocks[:size]).reshape(shape)


def bitsandbytes_8bit(get: Callable[[str], np.ndarray]) -> np.ndarray:
  """bitsandbytes' int8: rows of int8 by their largest magnitude (SCB [out]), float32 [out, in]."""
  magnitudes = np.asarray(get('SCB')).astype(np.float32)
  return np.asarray(get('')).view(np.int8).astype(np.float32) * (magnitudes / 127)[:, None]


def fp8_blocks(get: Callable[[str], np.ndarray], block: tuple[int, int]) -> np.ndarray:
  """float8_e4m3fn by blocks: weight_scale_inv [out / block, in / block] multiplies, float32 [out, in]."""
  weight = np.asarray(get('')).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  scales = np.asarray(get('weight_scale_inv')).astype(np.float32)
  scales = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)
  return weight * scales[: weight.shape[0], : weight.shape[1]]


def compressed_packed(get: Callable[[str], np.ndarray], bits: int, symmetric: bool) -> np.ndarray:
  """compressed-tensors' pack-quantized: (q - zero) scale, float32 [out, in].

  Args:
    get: weight_packed int32 [out, in x bits / 32], weight_scale [out, groups], weight_shape [2], and where they
      are, weight_zero_point int32 [out x bits / 32, groups] and weight_g_idx [in], the group of every column.
      Numbers and zero points are stored plus half of the range.
    bits: of a number.
    symmetric: whether there are no zero points.
  """
  rows, columns = (int(n) for n in np.asarray(get('weight_shape')).reshape(-1))
  half = np.float32(2 ** (bits - 1))
  numbers = unpack_bits(get('weight_packed'), bits, axis=1)[:, :columns].astype(np.float32) - half
  scales = np.asarray(get('weight_scale')).astype(np.float32).reshape(rows, -1)
  groups = scales.shape[1]
  group_of = np.arange(columns) * groups // columns
  if get.has('weight_g_idx'):
    stored = np.asarray(get('weight_g_idx')).reshape(-1)
    group_of = stored if (stored >= 0).all() else group_of  # -1 means the usual order
  if not symmetric:
    zeros = unpack_bits(get('weight_zero_point'), bits, axis=0)[:rows].astype(np.float32) - half
    numbers = numbers - zeros[:, group_of]
  return numbers * scales[:, group_of]


def compressed_plain(get: Callable[[str], np.ndarray], kind: str) -> np.ndarray:
  """compressed-tensors' int-quantized and float-quantized: (weight - zero) scale, float32 [out, in].

  Args:
    get: the weight in int8 or float8_e4m3fn under '', weight_scale of one number, [out, 1], [out, groups] or
      by blocks [out / block, in / block], and weight_zero_point where there are zero points.
    kind: 'int' or 'float'.
  """
  stored = np.asarray(get(''))
  weight = stored.view(np.int8 if kind == 'int' else ml_dtypes.float8_e4m3fn).astype(np.float32)
  if get.has('weight_zero_point'):
    zeros = np.asarray(get('weight_zero_point')).astype(np.float32)
    weight = weight - _over(zeros, weight.shape)
  return weight * _over(np.asarray(get('weight_scale')).astype(np.float32), weight.shape)


def _over(scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Scales of a whole matrix, of rows, of groups or of blocks, one for every number."""
  scales = scales.reshape(1, 1) if scales.size == 1 else scales.reshape(len(scales), -1)
  repeats = [-(-size // n) for size, n in zip(shape, scales.shape, strict=True)]
  wide = np.repeat(np.repeat(scales, repeats[0], axis=0), repeats[1], axis=1)
  return wide[: shape[0], : shape[1]]


def chatglm(get: Callable[[str], np.ndarray], bits: int) -> np.ndarray:
  """ChatGLM's own layout: rows of whole numbers by one scale, float32 [out, in].

  Args:
    get: the weight int8 under '', [out, in] of 8 bits or [out, in / 2] of 4, where the high bits are the even
      column, both signed; and weight_scale [out].
    bits: 4 or 8.
  """
  stored = np.asarray(get('')).view(np.int8)
  if bits == 4:
    high = stored >> 4  # of signed numbers, so that the sign is kept
    low = (stored << 4).astype(np.int8) >> 4
    stored = np.stack([high, low], axis=-1).reshape(len(stored), -1)
  scales = np.asarray(get('weight_scale')).astype(np.float32).reshape(-1, 1)
  return stored.astype(np.float32) * scales
