"""Reads weights that a Hugging Face folder has in 2 to 8 bits, as the matrices that they stand for.

Each format has a few tensors in place of one `*.weight`. `unpack(tensors, options)` returns a mapping with that
weight, computed when it is asked for, so that the families' tables need not know of packing:

    GPTQ                qweight, qzeros, scales, g_idx    (Frantar et al. 2023, arXiv:2210.17323)
    AWQ                 qweight, qzeros, scales           (Lin et al. 2024, arXiv:2306.00978)
    bitsandbytes        weight, absmax, quant_map, ...    (Dettmers et al. 2023, arXiv:2305.14314)
    fp8                 weight, weight_scale_inv          (DeepSeek-V3, arXiv:2412.19437, section 3.3)
    compressed-tensors  weight_packed or weight, weight_scale, weight_zero_point, ...
    ChatGLM             weight, weight_scale              (as released beside ChatGLM2-6B)

A weight is [out, in], as torch's Linear has it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.huggingface import packed_formulas as formulas


class Suffixes:
  """The tensors that stand for one weight, by the ending behind the module's name."""

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
  """The tensors of a folder, with the float32 matrices that packed weights stand for in their place."""

  def __init__(
    self, tensors, markers: tuple[str, ...], read: Callable[[Suffixes], np.ndarray], shape
  ):
    """
    Args:
      tensors: a mapping with `shapes`, as `files.Tensors`.
      markers: endings of the tensors of a packed weight; a weight with the first of them is packed.
      read: returns the matrix.
      shape: returns the matrix's shape without reading it.
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
      replaced = [f'{suffixes.module}.{marker}' for marker in markers]
      replaced += [name for name in tensors if name.startswith(f'{weight}.')]
      for name in replaced:
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
  """Returns the tensors of a folder as floating-point matrices.

  Args:
    tensors: a mapping with `shapes` and `raw`, as `files.Tensors`.
    options: the `quantization_config` of config.json.

  Raises:
    UserError: the format, or one of its options, is not supported; the message names it.
  """
  if not isinstance(options, dict):
    raise UserError(f'config.json: quantization_config is {options!r}, and must be an object.')
  method = options.get('quant_method') or ('bitsandbytes' if 'load_in_4bit' in options else None)
  readers = {
    'gptq': _gptq, 'awq': _awq, 'bitsandbytes': _bitsandbytes, 'fp8': _fp8,
    'compressed-tensors': _compressed, 'chatglm': _chatglm,
  }  # fmt: skip
  if method not in readers:
    raise UserError(
      f'config.json: quantization_config has quant_method {method!r}; only '
      f'{", ".join(sorted(readers))} can be read. Save the model in bfloat16 first.'
    )
  return readers[method](tensors, options)


def _require(options: dict, **allowed) -> None:
  """Refuses options with other values than these."""
  for name, values in allowed.items():
    if name in options and options[name] not in values:
      shown = f'{name} = {options[name]!r}; only {" or ".join(map(repr, values))}'
      raise UserError(f'config.json: quantization_config has {shown} can be read.')


def _gptq(tensors, options: dict):
  _require(options, bits=(2, 3, 4, 8), checkpoint_format=('gptq', 'gptq_v2'))
  bits, label = options.get('bits', 4), options.get('checkpoint_format', 'gptq')

  def read(get: Suffixes) -> np.ndarray:
    symmetric = options.get('sym', True)
    plus_one = formulas.stores_zeros_less_one(get('qzeros'), bits, symmetric, label)
    return formulas.gptq(get, bits, plus_one)

  def shape(get: Suffixes) -> tuple[int, int]:
    rows, columns = tensors.shapes[get.name('qweight')]
    return columns, 32 * rows // bits

  return Unpacked(tensors, ('qweight', 'qzeros', 'scales', 'g_idx'), read, shape)


def _awq(tensors, options: dict):
  _require(options, bits=(4,), version=('gemm', 'GEMM'), zero_point=(True,))

  def shape(get: Suffixes) -> tuple[int, int]:
    rows, columns = tensors.shapes[get.name('qweight')]
    return 8 * columns, rows

  return Unpacked(tensors, ('qweight', 'qzeros', 'scales'), formulas.awq, shape)


def _bitsandbytes(tensors, options: dict):
  if options.get('load_in_8bit'):

    def shape(get: Suffixes) -> tuple[int, ...]:
      return tensors.shapes[get.weight]

    return Unpacked(tensors, ('SCB', 'weight_format'), formulas.bitsandbytes_8bit, shape)
  kind = options.get('bnb_4bit_quant_type', 'fp4')
  _require(options, bnb_4bit_quant_type=('nf4', 'fp4'), bnb_4bit_quant_storage=('uint8',))

  def read(get: Suffixes) -> np.ndarray:
    return formulas.bitsandbytes_4bit(get, kind)

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
    return formulas.fp8_blocks(get, block)

  def shape(get: Suffixes) -> tuple[int, ...]:
    return tensors.shapes[get.weight]

  return Unpacked(tensors, ('weight_scale_inv',), read, shape)


def _compressed(tensors, options: dict):
  """compressed-tensors: one scheme for all matrices, in whole numbers or float8."""
  _require(
    options,
    format=('pack-quantized', 'int-quantized', 'float-quantized', 'naive-quantized'),
    quantization_status=('compressed', 'frozen'),
    kv_cache_scheme=(None,),
  )
  if (options.get('sparsity_config') or {}).get('format', 'dense') != 'dense':
    raise UserError(
      'config.json: quantization_config has a sparsity_config; only dense weights can be read.'
    )
  schemes = [group.get('weights') or {} for group in (options.get('config_groups') or {}).values()]
  kinds = {(s.get('num_bits'), s.get('type', 'int'), s.get('symmetric', True)) for s in schemes}
  if len(kinds) != 1:
    raise UserError(
      f'config.json: quantization_config has {len(kinds)} kinds of weights in config_groups; only one '
      'can be read.'
    )
  ((bits, kind, symmetric),) = kinds
  known = {'int': (2, 3, 4, 8), 'float': (8,)}
  if bits not in known.get(kind, ()):
    raise UserError(
      f'config.json: quantization_config has weights of type {kind!r} and num_bits {bits!r}; only whole '
      'numbers of 2, 3, 4 or 8 bits and floating point of 8 can be read.'
    )
  beside = ('weight_zero_point', 'weight_shape', 'weight_g_idx')
  if options.get('format') == 'pack-quantized':

    def packed_shape(get: Suffixes) -> tuple[int, ...]:
      return tuple(int(n) for n in np.asarray(get('weight_shape')).reshape(-1))

    def read_packed(get: Suffixes) -> np.ndarray:
      return formulas.compressed_packed(get, bits, symmetric)

    markers = ('weight_packed', 'weight_scale', *beside)
    return Unpacked(tensors, markers, read_packed, packed_shape)

  def shape(get: Suffixes) -> tuple[int, ...]:
    return tensors.shapes[get.weight]

  def read(get: Suffixes) -> np.ndarray:
    return formulas.compressed_plain(get, kind)

  return Unpacked(tensors, ('weight_scale', *beside), read, shape)


def _chatglm(tensors, options: dict):
  _require(options, bits=(4, 8))
  bits = options['bits']

  def shape(get: Suffixes) -> tuple[int, int]:
    rows, columns = tensors.shapes[get.weight]
    return rows, columns * 8 // bits

  def read(get: Suffixes) -> np.ndarray:
    return formulas.chatglm(get, bits)

  return Unpacked(tensors, ('weight_scale',), read, shape)
