"""Weights packed in 4 and 8 bits are the matrices that their formats' own formulas give."""

import json

import ml_dtypes
import numpy as np
import pytest

from research.core.errors import UserError
from research.huggingface import packed, packed_formulas

OUT, IN, GROUP = 16, 32, 8


class Store(dict):
  """Tensors by name, with their shapes, as a folder of files has them."""

  def raw(self, name):
    return self[name]

  @property
  def shapes(self) -> dict:
    return {name: tuple(value.shape) for name, value in self.items()}


def pack(numbers: np.ndarray, order=tuple(range(8))) -> np.ndarray:
  """int32 words of eight numbers each along the last axis, written as a loop."""
  words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // 8), np.uint32)
  for index in np.ndindex(words.shape):
    for i, place in enumerate(order):
      number = int(numbers[(*index[:-1], 8 * index[-1] + place)])
      words[index] |= np.uint32(number << (4 * i))
  return words.view(np.int32)


@pytest.fixture
def quantised():
  random = np.random.default_rng(0)
  return {
    'numbers': random.integers(0, 16, (IN, OUT)),
    'zeros': random.integers(0, 16, (IN // GROUP, OUT)),
    'scales': random.uniform(0.01, 0.1, (IN // GROUP, OUT)).astype(np.float16),
    'order': random.permutation(np.repeat(np.arange(IN // GROUP), GROUP)).astype(np.int32),
  }


def expected(quantised, group_of) -> np.ndarray:
  matrix = np.empty((OUT, IN), np.float32)
  for row in range(IN):
    for column in range(OUT):
      group = group_of[row]
      scale = np.float32(quantised['scales'][group, column])
      number = float(quantised['numbers'][row, column]) - quantised['zeros'][group, column]
      matrix[column, row] = number * scale
  return matrix


@pytest.mark.parametrize('label', ['gptq', 'gptq_v2'])
@pytest.mark.parametrize('reordered', [False, True])
def test_gptq_with_both_kinds_of_zero_points_and_any_order_of_rows(quantised, label, reordered):
  plain = np.repeat(np.arange(IN // GROUP), GROUP)
  group_of = quantised['order'] if reordered else plain
  stored = (quantised['zeros'] - (label == 'gptq')) % 16
  store = Store({
    'a.qweight': pack(quantised['numbers'].T).T,
    'a.qzeros': pack(stored),
    'a.scales': quantised['scales'],
    'b.weight': np.ones(3, np.float32),
  })  # fmt: skip
  if reordered:
    store['a.g_idx'] = quantised['order']
  options = {'quant_method': 'gptq', 'bits': 4, 'sym': False, 'checkpoint_format': label}
  tensors = packed.unpack(store, options)
  assert set(tensors) == {'a.weight', 'b.weight'}
  assert tensors.shapes['a.weight'] == (OUT, IN)
  np.testing.assert_array_equal(tensors['a.weight'], expected(quantised, group_of))


@pytest.mark.parametrize('stored', [7, 8])
def test_a_symmetric_gptq_file_is_read_by_its_zero_points_and_not_by_its_label(quantised, stored):
  quantised['zeros'] = np.full_like(quantised['zeros'], 8)
  store = Store({
    'a.qweight': pack(quantised['numbers'].T).T,
    'a.qzeros': pack(np.full_like(quantised['zeros'], stored)),
    'a.scales': quantised['scales'],
  })  # fmt: skip
  wrong = 'gptq_v2' if stored == 7 else 'gptq'
  options = {'quant_method': 'gptq', 'bits': 4, 'sym': True, 'checkpoint_format': wrong}
  tensors = packed.unpack(store, options)
  group_of = np.repeat(np.arange(IN // GROUP), GROUP)
  np.testing.assert_array_equal(tensors['a.weight'], expected(quantised, group_of))


def test_awq_with_its_order_of_columns_and_zero_points_of_nothing(quantised):
  quantised['zeros'][0] = 0  # must not become 15
  store = Store({
    'a.qweight': pack(quantised['numbers'], packed_formulas.AWQ_ORDER),
    'a.qzeros': pack(quantised['zeros'], packed_formulas.AWQ_ORDER),
    'a.scales': quantised['scales'],
  })  # fmt: skip
  options = {'quant_method': 'awq', 'bits': 4, 'version': 'gemm', 'zero_point': True}
  tensors = packed.unpack(store, options)
  group_of = np.repeat(np.arange(IN // GROUP), GROUP)
  assert tensors.shapes['a.weight'] == (OUT, IN)
  np.testing.assert_array_equal(tensors['a.weight'], expected(quantised, group_of))


@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
@pytest.mark.parametrize('nested', [False, True])
def test_bitsandbytes_in_four_bits(kind, nested):
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes.functional')
  weight = torch.tensor(np.random.default_rng(0).normal(size=(48, 80)).astype(np.float32))
  values, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
  store = Store({'a.weight': values.numpy()})
  store |= {f'a.weight.{k}': np.asarray(v) for k, v in state.as_dict(packed=True).items()}
  store = Store(store)
  options = {'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'bnb_4bit_quant_type': kind}
  tensors = packed.unpack(store, options)
  assert set(tensors) == {'a.weight'}
  assert tensors.shapes['a.weight'] == (48, 80)
  reference = bnb.dequantize_4bit(values, state).numpy()
  np.testing.assert_allclose(tensors['a.weight'], reference, rtol=0, atol=1e-6)


def test_bitsandbytes_in_eight_bits():
  random = np.random.default_rng(0)
  numbers, largest = random.integers(-127, 128, (4, 6)).astype(np.int8), random.uniform(1, 2, 4)
  store = Store(
    {'a.weight': numbers, 'a.SCB': largest.astype(np.float32), 'a.weight_format': np.uint8(0)}
  )
  options = {'quant_method': 'bitsandbytes', 'load_in_8bit': True}
  tensors = packed.unpack(store, options)
  assert set(tensors) == {'a.weight'}
  reference = [[numbers[i, j] * largest[i] / 127 for j in range(6)] for i in range(4)]
  np.testing.assert_allclose(tensors['a.weight'], reference, rtol=1e-6)


def test_fp8_by_blocks_that_do_not_divide_the_matrix():
  random = np.random.default_rng(0)
  weight = random.normal(size=(5, 7)).astype(ml_dtypes.float8_e4m3fn)
  scales = random.uniform(1, 2, (3, 2)).astype(np.float32)
  store = Store({'a.weight': weight, 'a.weight_scale_inv': scales})
  options = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [2, 4]}
  tensors = packed.unpack(store, options)
  reference = [[float(weight[i, j]) * scales[i // 2, j // 4] for j in range(7)] for i in range(5)]
  np.testing.assert_allclose(tensors['a.weight'], reference, rtol=1e-6)


def dense(numbers: np.ndarray, bits: int) -> np.ndarray:
  """int32 words of numbers of any width along the last axis, one after another in a long whole number."""
  count = -(-numbers.shape[-1] * bits // 32)
  words = np.zeros((*numbers.shape[:-1], count), np.uint32)
  for index in np.ndindex(numbers.shape[:-1]):
    whole = sum(int(n) << (bits * i) for i, n in enumerate(numbers[index]))
    words[index] = [(whole >> (32 * k)) % 2**32 for k in range(count)]
  return words.view(np.int32)


@pytest.mark.parametrize('bits', [2, 3, 8])
def test_gptq_of_other_widths(bits):
  random = np.random.default_rng(0)
  numbers = random.integers(0, 2**bits, (32, 32))
  zeros = random.integers(1, 2**bits, (4, 32))
  scales = random.uniform(0.01, 0.1, (4, 32)).astype(np.float16)
  store = Store({
    'a.qweight': dense(numbers.T, bits).T, 'a.qzeros': dense(zeros - 1, bits), 'a.scales': scales,
  })  # fmt: skip
  tensors = packed.unpack(store, {'quant_method': 'gptq', 'bits': bits, 'sym': False})
  assert tensors.shapes['a.weight'] == (32, 32)
  group = np.arange(32) // 8
  reference = (numbers - zeros[group]) * scales[group].astype(np.float32)
  np.testing.assert_allclose(tensors['a.weight'], reference.T, rtol=1e-6)


def scheme(**weights) -> dict:
  return {'config_groups': {'group_0': {'weights': weights, 'targets': ['Linear']}}}


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('reordered', [True, False])
def test_compressed_tensors_packed(bits, symmetric, reordered):
  random = np.random.default_rng(0)
  rows, columns, groups, half = 16, 24, 3, 2 ** (bits - 1)
  numbers = random.integers(-half, half, (rows, columns))
  zeros = random.integers(-half, half, (rows, groups))
  scales = random.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
  group = np.arange(columns) // 8
  store = Store({
    'a.weight_packed': dense(numbers + half, bits), 'a.weight_scale': scales,
    'a.weight_shape': np.array([rows, columns], np.int64),
  })  # fmt: skip
  if not symmetric:
    store['a.weight_zero_point'] = np.ascontiguousarray(dense((zeros + half).T, bits).T)
  if reordered:
    group = random.permutation(group)
    store['a.weight_g_idx'] = group.astype(np.int32)
  options = {
    'quant_method': 'compressed-tensors', 'format': 'pack-quantized', 'quantization_status': 'compressed',
    **scheme(num_bits=bits, type='int', symmetric=symmetric, strategy='group', group_size=8),
  }  # fmt: skip
  tensors = packed.unpack(store, options)
  assert set(tensors) == {'a.weight'}
  assert tensors.shapes['a.weight'] == (rows, columns)
  offset = 0 if symmetric else zeros[:, group]
  reference = (numbers - offset) * scales[:, group].astype(np.float32)
  np.testing.assert_allclose(tensors['a.weight'], reference, rtol=1e-6)


@pytest.mark.parametrize('kind', ['int', 'float'])
@pytest.mark.parametrize('shape', [(1,), (6, 1), (6, 4), (3, 2)])
def test_compressed_tensors_that_are_not_packed(kind, shape):
  random = np.random.default_rng(0)
  weight = random.integers(-127, 128, (6, 8)).astype(np.float32)
  stored = weight.astype(np.int8 if kind == 'int' else ml_dtypes.float8_e4m3fn)
  scales = random.uniform(1, 2, shape).astype(ml_dtypes.bfloat16)
  options = {
    'quant_method': 'compressed-tensors', 'format': f'{kind}-quantized',
    **scheme(num_bits=8, type=kind, symmetric=True),
  }  # fmt: skip
  tensors = packed.unpack(Store({'a.weight': stored, 'a.weight_scale': scales}), options)
  wide = scales.astype(np.float32).reshape(len(scales), -1)
  reference = [
    [float(stored[i, j]) * wide[i * len(wide) // 6, j * wide.shape[1] // 8] for j in range(8)]
    for i in range(6)
  ]
  np.testing.assert_allclose(tensors['a.weight'], reference, rtol=1e-6)


@pytest.mark.parametrize('bits', [4, 8])
def test_chatglms_own_layout(bits):
  random = np.random.default_rng(0)
  top = 2 ** (bits - 1) - 1
  numbers = random.integers(-top, top + 1, (4, 6))
  scales = random.uniform(1, 2, 4).astype(np.float16)
  stored = numbers.astype(np.int8)
  if bits == 4:
    pairs = [[(row[i] & 15) << 4 | (row[i + 1] & 15) for i in range(0, 6, 2)] for row in numbers]
    stored = np.array(pairs, np.uint8).view(np.int8)
  tensors = packed.unpack(
    Store({'a.weight': stored, 'a.weight_scale': scales}), {'quant_method': 'chatglm', 'bits': bits}
  )
  assert tensors.shapes['a.weight'] == (4, 6)
  reference = numbers * scales.astype(np.float32)[:, None]
  np.testing.assert_array_equal(tensors['a.weight'], reference)


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    (
      {'quant_method': 'hqq'},
      "quant_method 'hqq'; only awq, bitsandbytes, chatglm, compressed-tensors, fp8, gptq can be read",
    ),
    ({'quant_method': 'gptq', 'bits': 5}, 'bits = 5; only 2 or 3'),
    ({'quant_method': 'awq', 'bits': 4, 'version': 'gemv'}, "version = 'gemv'"),
    ({'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'bnb_4bit_quant_type': 'int4'}, 'int4'),
    ({'quant_method': 'fp8', 'fmt': 'e4m3'}, 'weight_block_size'),
    ({'quant_method': 'compressed-tensors', 'format': 'nvfp4-pack-quantized'}, 'nvfp4'),
    ({'quant_method': 'compressed-tensors', **scheme(num_bits=4, type='float')}, "type 'float'"),
    ({'quant_method': 'compressed-tensors'}, '0 kinds of weights'),
    (
      {'quant_method': 'compressed-tensors', 'sparsity_config': {'format': 'sparse-24-bitmask'}},
      'sparsity_config',
    ),
  ],
)
def test_a_format_that_is_not_known_is_named(options, says):
  with pytest.raises(UserError, match=says):
    packed.unpack(Store(), options)


def test_a_missing_tensor_is_named(quantised):
  store = Store({'a.qweight': pack(quantised['numbers'].T).T})
  tensors = packed.unpack(store, {'quant_method': 'gptq', 'bits': 4})
  with pytest.raises(UserError, match=r'a\.qzeros is missing'):
    tensors['a.weight']


@pytest.mark.slow
def test_a_packed_llama_is_the_llama_that_its_numbers_stand_for(tmp_path):
  """A tiny LLaMA whose projections are in GPTQ's 4 bits converts to the dequantised folder's parameters."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  import jax
  from safetensors.numpy import load_file, save_file

  from research.huggingface import inwards

  config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(tmp_path / 'plain')
  tensors = load_file(tmp_path / 'plain' / 'model.safetensors')
  quantised, plain = {}, {}
  for name, weight in tensors.items():
    if '_proj' not in name:
      quantised[name] = plain[name] = weight
      continue
    columns = weight.T.reshape(-1, 8, weight.shape[0])  # groups of eight inputs
    scales = (np.abs(columns).max(1) / 7).astype(np.float16)
    numbers = np.clip(np.round(columns / scales[:, None].astype(np.float32)) + 8, 0, 15)
    numbers = numbers.reshape(-1, weight.shape[0]).astype(int)
    module = name.removesuffix('.weight')
    quantised[f'{module}.qweight'] = np.ascontiguousarray(pack(numbers.T).T)
    quantised[f'{module}.qzeros'] = pack(np.full((len(scales), weight.shape[0]), 7))
    quantised[f'{module}.scales'] = np.ascontiguousarray(scales)
    plain[name] = np.ascontiguousarray(
      ((numbers.reshape(columns.shape) - 8) * scales[:, None].astype(np.float32))
      .reshape(numbers.shape)
      .T.astype(np.float32)
    )
  (tmp_path / 'packed').mkdir()
  save_file(quantised, tmp_path / 'packed' / 'model.safetensors', metadata={'format': 'pt'})
  save_file(plain, tmp_path / 'plain' / 'model.safetensors', metadata={'format': 'pt'})
  settings = json.loads((tmp_path / 'plain' / 'config.json').read_text())
  settings['quantization_config'] = {
    'quant_method': 'gptq',
    'bits': 4,
    'group_size': 8,
    'sym': True,
  }
  (tmp_path / 'packed' / 'config.json').write_text(json.dumps(settings))
  text, params = inwards.load(tmp_path / 'packed')
  plain_text, plain_params = inwards.load(
    tmp_path / 'plain'
  )  # whose logits are transformers': test_parity.py
  assert text == plain_text
  leaves = jax.tree.leaves(params)
  for ours, reference in zip(leaves, jax.tree.leaves(plain_params), strict=True):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)
