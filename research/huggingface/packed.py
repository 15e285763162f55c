"""Weights that a Hugging Face folder holds in 4 or 8 bits, read as the matrices that they stand for.

Each format names a few tensors in place of one `*.weight`. `unpack(tensors, options)` gives a mapping in which
the one weight is back, computed when it is asked for, so that the families' tables know nothing of it:

    GPTQ            qweight, qzeros, scales, g_idx       (Frantar et al. 2023, arXiv:2210.17323)
    AWQ             qweight, qzeros, scales              (Lin et al. 2024, arXiv:2306.00978)
    bitsandbytes    weight, absmax, quant_map, ...       (Dettmers et al. 2023, arXiv:2305.14314)
    fp8             weight, weight_scale_inv             (DeepSeek-V3, arXiv:2412.19437, section 3.3)

A weight is [out, in], as torch's Linear has it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from research.core.errors import UserError

# AWQ packs eight columns into one int32 in this order, for the sake of its CUDA kernel.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_nibbles(
  words: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))
) -> np.ndarray:
  """The eight 4-bit numbers of every int32, lowest bits first, along `axis`.

  Args:
    words: int32.
    axis: the axis that grows eightfold.
    order: the place that the i-th number of a word has among the eight.
  Returns:
    uint8 of 0 to 15.
  """
  words = np.moveaxis(words.view(np.uint32), axis, -1)
  numbers = np.empty((*words.shape, 8), np.uint8)
  for i, place in enumerate(order):
    numbers[..., place] = (words >> np.uint32(4 * i)) & np.uint32(15)
  flat = numbers.reshape(*words.shape[:-1], -1)
  return np.moveaxis(flat, -1, axis)


def gptq(get: Callable[[str], np.ndarray], plus_one: bool) -> np.ndarray:
  """GPTQ in 4 bits: (q - zero) scale, float32 [out, in].

  Args:
    get: a tensor by its suffix: qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales
      [groups, out], and g_idx int32 [in], the group of every row.
    plus_one: whether zero points are stored less one, as GPTQ's first format does.
  """
  numbers = unpack_nibbles(np.asarray(get('qweight')), axis=0).astype(np.float32)
  zeros = unpack_nibbles(np.asarray(get('qzeros')), axis=1).astype(np.float32)
  if plus_one:
    zeros = (zeros + 1) % 16
  scales = np.asarray(get('scales')).astype(np.float32)
  rows, groups = len(numbers), len(scales)
  group_of = np.asarray(get('g_idx')) if get.has('g_idx') else np.arange(rows) * groups // rows
  return ((numbers - zeros[group_of]) * scales[group_of]).T


def stores_zeros_less_one(qzeros: np.ndarray, symmetric: bool, label: str) -> bool:
  """Whether a GPTQ file has the first format, whose zero points are stored less one.

  The label of a file is often wrong. A symmetric quantiser's zero point is 8, so that a stored 7 or 8 tells the
  formats apart; only an asymmetric file must be believed.
  """
  if symmetric:
    stored = np.unique(unpack_nibbles(np.asarray(qzeros), axis=1))
    if stored.tolist() == [7]:
      return True
    if stored.tolist() == [8]:
      return False
  return label != 'gptq_v2'


def awq(get: Callable[[str], np.ndarray]) -> np.ndarray:
  """AWQ in 4 bits: (q - zero) scale, float32 [out, in].

  Args:
    get: a tensor by its suffix: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales
      [groups, out].
  """
  numbers = unpack_nibbles(np.asarray(get('qweight')), axis=1, order=AWQ_ORDER).astype(np.float32)
  zeros = unpack_nibbles(np.asarray(get('qzeros')), axis=1, order=AWQ_ORDER).astype(np.float32)
  scales = np.asarray(get('scales')).astype(np.float32)
  rows_per_group = len(numbers) // len(scales)
  zeros = np.repeat(zeros, rows_per_group, axis=0)
  scales = np.repeat(scales, rows_per_group, axis=0)
  return ((numbers - zeros) * scales).T


def bitsandbytes_4bit(get: Callable[[str], np.ndarray], kind: str) -> np.ndarray:
  """bitsandbytes' nf4 or fp4: a code book times the largest magnitude of each block, float32 [out, in].

  Args:
    get: a tensor by its suffix: the packed weight uint8 [n / 2, 1] under '', absmax, quant_map float32
      [16], nested_absmax and nested_quant_map where the magnitudes are quantised too, and quant_state.
    kind: 'nf4' or 'fp4'.
  """
  state = json.loads(bytes(np.asarray(get(f'quant_state.bitsandbytes__{kind}'))))
  packed = np.asarray(get('')).reshape(-1)
  codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(
    -1
  )  # the high bits are the first number
  magnitudes = np.asarray(get('absmax')).reshape(-1)
  if get.has('nested_absmax'):
    book = np.asarray(get('nested_quant_map')).astype(np.float32)
    nested = np.asarray(get('nested_absmax')).astype(np.float32).reshape(-1)
    each = np.repeat(nested, state['nested_blocksize'])[: len(magnitudes)]
    magnitudes = book[magnitudes] * each + np.float32(state['nested_offset'])
  values = np.asarray(get('quant_map')).astype(np.float32)[codes]
  blocks = np.repeat(magnitudes.astype(np.float32), state['blocksize'])
  size = int(np.prod(state['shape']))
  return (values[:size] * blocks[:size]).reshape(state['shape'])


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


class Suffixes:
  """The tensors that stand for one weight, by what follows the module's name."""

  def __init__(self, tensors: Mapping, module: str, weight: str):
    self.tensors = tensors
    self.module = module
    self.weight = weight

  def name(self, suffix: str) -> str:
    # bitsandbytes puts its tensors under the weight's name, the others beside it.
    under = f'{self.weight}.{suffix}' if suffix else self.weight
    return under if under in self.tensors else f'{self.module}.{suffix}'

  def has(self, suffix: str) -> bool:
    return self.name(suffix) in self.tensors

  def __call__(self, suffix: str) -> np.ndarray:
    name = self.name(suffix)
    if name not in self.tensors:
      raise UserError(f'{name} is missing; {self.weight} cannot be unpacked without it.')
    return self.tensors.raw(name)


class Unpacked(Mapping):
  """A folder's tensors, packed weights replaced by the matrices that they stand for, float32."""

  def __init__(
    self, tensors, markers: tuple[str, ...], read: Callable[[Suffixes], np.ndarray], shape
  ):
    """
    Args:
      tensors: a mapping with `shapes`, as `files.Tensors`.
      markers: suffixes beside or under a weight that make it a packed one; the first one tells.
      read: gives the matrix.
      shape: gives the matrix's shape without reading it.
    """
    self.tensors = tensors
    self.read = read
    self.packed: dict[str, Suffixes] = {}
    self.shapes = dict(tensors.shapes)
    for name in tensors:
      module, _, suffix = name.rpartition(f'.{markers[0]}')
      if module and not suffix:
        weight = module if module.endswith('.weight') else f'{module}.weight'
        suffixes = Suffixes(tensors, weight.removesuffix('.weight'), weight)
        self.packed[weight] = suffixes
    for weight, suffixes in self.packed.items():
      own = [f'{suffixes.module}.{marker}' for marker in markers]
      own += [name for name in tensors if name.startswith(f'{weight}.')]
      for name in own:
        self.shapes.pop(name, None)
      self.shapes[weight] = shape(suffixes)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read(self.packed[name]) if name in self.packed else self.tensors[name]

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.shapes or self.shapes[name] != self.shapes.get(other):
      return False
    return bool((self[name] == self[other]).all())

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def unpack(tensors, options: dict[str, Any]):
  """The tensors of a folder as floating-point matrices, by the `quantization_config` of its config.json.

  Raises:
    UserError: a format, or an option of one, that is not known; it names it.
  """
  if not isinstance(options, dict):
    raise UserError(f'config.json: quantization_config is {options!r}, and must be an object.')
  method = options.get('quant_method') or ('bitsandbytes' if 'load_in_4bit' in options else None)
  readers = {'gptq': _gptq, 'awq': _awq, 'bitsandbytes': _bitsandbytes, 'fp8': _fp8}
  if method not in readers:
    raise UserError(
      f'config.json: quantization_config has quant_method {method!r}; only '
      f'{", ".join(sorted(readers))} can be read. Save the model in bfloat16 first.'
    )
  return readers[method](tensors, options)


def _require(options: dict, **allowed) -> None:
  for name, values in allowed.items():
    if name in options and options[name] not in values:
      shown = f'{name} = {options[name]!r}; only {" or ".join(map(repr, values))}'
      raise UserError(f'config.json: quantization_config has {shown} can be read.')


def _gptq(tensors, options: dict):
  _require(options, bits=(4,))
  label = options.get('checkpoint_format', 'gptq')
  _require(options, checkpoint_format=('gptq', 'gptq_v2'))

  def read(get: Suffixes) -> np.ndarray:
    plus_one = stores_zeros_less_one(get('qzeros'), options.get('sym', True), label)
    return gptq(get, plus_one)

  def shape(get: Suffixes) -> tuple[int, int]:
    rows, columns = tensors.shapes[get.name('qweight')]
    return columns, 8 * rows

  return Unpacked(tensors, ('qweight', 'qzeros', 'scales', 'g_idx'), read, shape)


def _awq(tensors, options: dict):
  _require(options, bits=(4,), version=('gemm', 'GEMM'), zero_point=(True,))

  def shape(get: Suffixes) -> tuple[int, int]:
    rows, columns = tensors.shapes[get.name('qweight')]
    return 8 * columns, rows

  return Unpacked(tensors, ('qweight', 'qzeros', 'scales'), awq, shape)


def _bitsandbytes(tensors, options: dict):
  if options.get('load_in_8bit'):

    def shape(get: Suffixes) -> tuple[int, ...]:
      return tensors.shapes[get.weight]

    return Unpacked(tensors, ('SCB', 'weight_format'), bitsandbytes_8bit, shape)
  kind = options.get('bnb_4bit_quant_type', 'fp4')
  _require(options, bnb_4bit_quant_type=('nf4', 'fp4'), bnb_4bit_quant_storage=('uint8',))

  def read(get: Suffixes) -> np.ndarray:
    return bitsandbytes_4bit(get, kind)

  def shape(get: Suffixes) -> tuple[int, ...]:
    state = json.loads(bytes(np.asarray(get(f'quant_state.bitsandbytes__{kind}'))))
    return tuple(state['shape'])

  return Unpacked(tensors, ('absmax',), read, shape)


def _fp8(tensors, options: dict):
  _require(options, fmt=('e4m3',))
  block = tuple(options.get('weight_block_size') or ())
  if len(block) != 2:
    raise UserError(
      'config.json: quantization_config needs weight_block_size, two numbers, to read fp8.'
    )

  def read(get: Suffixes) -> np.ndarray:
    return fp8_blocks(get, block)

  def shape(get: Suffixes) -> tuple[int, ...]:
    return tensors.shapes[get.weight]

  return Unpacked(tensors, ('weight_scale_inv',), read, shape)
