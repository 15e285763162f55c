"""The logits of a packed folder are those that transformers gives for the matrices that its numbers stand for.

Codes and scales are drawn, and the matrix is made of them by the formula of the format's authors, so that
nothing of ours is on the other side. One LLaMA of one layer serves all formats.
"""

import functools
import json
import pathlib
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from research.core import configs
from research.huggingface import inwards
from research.model import counts
from research.parallel.mesh import Mesh

pytestmark = pytest.mark.slow
SIZE = 256  # of every axis: K-quants cut rows into blocks of 256
HEADS = 4
GROUP = 64
CONFIG = {
  'model_type': 'llama', 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'hidden_size': SIZE, 'vocab_size': 32,
  'intermediate_size': SIZE, 'num_hidden_layers': 1, 'num_attention_heads': HEADS,
  'num_key_value_heads': HEADS, 'max_position_embeddings': 64, 'tie_word_embeddings': False,
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 12))


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
  """int32 words of numbers of any width along the last axis, the lowest bits first."""
  each = (numbers[..., None] >> np.arange(bits)) & 1
  stream = each.reshape(*numbers.shape[:-1], -1).astype(np.uint8)
  packed = np.packbits(stream, axis=-1, bitorder='little')
  return np.ascontiguousarray(packed).view(np.int32)


def drawn(random, bits: int) -> tuple[np.ndarray, ...]:
  """Codes [in, out], zero points and float16 scales [groups, out] of a matrix with numbers of about .05."""
  numbers = random.integers(0, 2**bits, (SIZE, SIZE))
  zeros = random.integers(1, 2**bits, (SIZE // GROUP, SIZE))
  scales = random.uniform(0.05, 0.1, (SIZE // GROUP, SIZE)) / 2 ** (bits - 1)
  return numbers, zeros, scales.astype(np.float16)


def gptq(name: str, random, bits: int, reordered: bool = False):
  numbers, zeros, scales = drawn(random, bits)
  group = np.arange(SIZE) // GROUP
  more = {}
  if reordered:
    group = random.permutation(group)
    more = {f'{name}.g_idx': group.astype(np.int32)}
  matrix = (numbers - zeros[group]) * scales[group].astype(np.float64)
  stored = {
    f'{name}.qweight': words(numbers.T, bits).T, f'{name}.qzeros': words(zeros - 1, bits),
    f'{name}.scales': scales,
  }  # fmt: skip
  return stored | more, matrix.T


def awq(name: str, random):
  numbers, zeros, scales = drawn(random, 4)
  group = np.arange(SIZE) // GROUP

  def in_order(x):  # the columns of a word, lowest bits first: 0, 2, 4, 6, 1, 3, 5, 7
    return x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape)

  stored = {
    f'{name}.qweight': words(in_order(numbers), 4), f'{name}.qzeros': words(in_order(zeros), 4),
    f'{name}.scales': scales,
  }  # fmt: skip
  return stored, ((numbers - zeros[group]) * scales[group].astype(np.float64)).T


def bitsandbytes_4bit(name: str, random, kind: str, nested: bool):
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes.functional')
  weight = torch.tensor(random.normal(0, 0.05, (SIZE, SIZE)).astype(np.float32))
  values, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
  stored = {f'{name}.weight': values.numpy()}
  stored |= {f'{name}.weight.{k}': np.asarray(v) for k, v in state.as_dict(packed=True).items()}
  return stored, bnb.dequantize_4bit(values, state).numpy()


def bitsandbytes_8bit(name: str, random):
  numbers = random.integers(-127, 128, (SIZE, SIZE)).astype(np.int8)
  largest = random.uniform(0.05, 0.1, SIZE).astype(np.float32)
  stored = {
    f'{name}.weight': numbers, f'{name}.SCB': largest, f'{name}.weight_format': np.uint8(0),
  }  # fmt: skip
  return stored, numbers * largest[:, None].astype(np.float64) / 127


def compressed_packed(name: str, random, bits: int, symmetric: bool):
  half = 2 ** (bits - 1)
  numbers, zeros, scales = drawn(random, bits)
  numbers, zeros, scales = numbers.T, zeros.T, np.ascontiguousarray(scales.T)
  stored = {
    f'{name}.weight_packed': words(numbers, bits), f'{name}.weight_scale': scales,
    f'{name}.weight_shape': np.array([SIZE, SIZE], np.int64),
  }  # fmt: skip
  if symmetric:
    zeros = np.full_like(zeros, half)
  else:
    stored[f'{name}.weight_zero_point'] = words(zeros.T, bits).T
  group = np.arange(SIZE) // GROUP
  return stored, (numbers - zeros[:, group]) * scales[:, group].astype(np.float64)


def compressed_plain(name: str, random, dtype):
  weight = random.integers(-127, 128, (SIZE, SIZE)).astype(np.float32).astype(dtype)
  scales = random.uniform(0.0005, 0.001, (SIZE, 1)).astype(np.float32)
  stored = {f'{name}.weight': weight, f'{name}.weight_scale': scales}
  return stored, weight.astype(np.float64) * scales


def fp8_blocks(name: str, random):
  weight = random.normal(size=(SIZE, SIZE)).astype(ml_dtypes.float8_e4m3fn)
  scales = random.uniform(0.03, 0.06, (SIZE // 128, SIZE // 128)).astype(np.float32)
  stored = {f'{name}.weight': weight, f'{name}.weight_scale_inv': scales}
  return stored, weight.astype(np.float64) * np.kron(scales, np.ones((128, 128)))


def bind(function, **options):
  return functools.partial(function, **options)


def scheme(form: str, **weights) -> dict:
  groups = {'group_0': {'weights': weights, 'targets': ['Linear']}}
  return {'quant_method': 'compressed-tensors', 'format': form, 'config_groups': groups}


GPTQ = {'quant_method': 'gptq', 'sym': False, 'checkpoint_format': 'gptq'}
BNB = {'quant_method': 'bitsandbytes'}
FOLDERS = {
  **{f'gptq {n} bits': (bind(gptq, bits=n), {**GPTQ, 'bits': n}) for n in (2, 3, 4, 8)},
  'gptq reordered': (bind(gptq, bits=4, reordered=True), {**GPTQ, 'bits': 4}),
  'awq': (awq, {'quant_method': 'awq', 'bits': 4, 'version': 'gemm', 'zero_point': True}),
  **{
    f'bitsandbytes {kind}{" nested" if nested else ""}': (
      bind(bitsandbytes_4bit, kind=kind, nested=nested),
      {**BNB, 'load_in_4bit': True, 'bnb_4bit_quant_type': kind},
    )
    for kind in ('nf4', 'fp4') for nested in (False, True)
  },
  'bitsandbytes int8': (bitsandbytes_8bit, {**BNB, 'load_in_8bit': True}),
  **{
    f'compressed-tensors packed {n} bits{"" if symmetric else " with zero points"}': (
      bind(compressed_packed, bits=n, symmetric=symmetric),
      scheme('pack-quantized', num_bits=n, type='int', symmetric=symmetric, strategy='group'),
    )
    for n in (4, 8) for symmetric in (True, False)
  },
  'compressed-tensors int8': (
    bind(compressed_plain, dtype=np.int8),
    scheme('int-quantized', num_bits=8, type='int', symmetric=True),
  ),
  'compressed-tensors float8': (
    bind(compressed_plain, dtype=ml_dtypes.float8_e4m3fn),
    scheme('float-quantized', num_bits=8, type='float', symmetric=True),
  ),
  'fp8 by blocks': (
    fp8_blocks, {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [128, 128]},
  ),
}  # fmt: skip


@functools.cache
def plain_tensors() -> dict[str, np.ndarray | None]:
  """The tensors of transformers' model that no format packs, and None for the others."""
  random = np.random.default_rng(0)

  def drawn_for(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if '_proj' in name:
      return None
    mean, deviation = (1, 0.3) if 'norm' in name else (0, SIZE**-0.5 if 'lm_head' in name else 1)
    return random.normal(mean, deviation, shape).astype(np.float32)

  return {name: drawn_for(name, x.shape) for name, x in reference().state_dict().items()}


@functools.cache
def reference():
  """transformers' model."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != 'model_type'})
  return transformers.LlamaForCausalLM(config).eval()


def expected_logits(tensors: dict[str, np.ndarray]) -> np.ndarray:
  import torch

  model = reference()
  model.load_state_dict({n: torch.tensor(np.asarray(x, np.float32)) for n, x in tensors.items()})
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


@functools.cache
def compiled(text: str):
  """The logits of the model of a gin text as a function of its parameters."""
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')
  with Mesh().use(jax.devices()[:1]):
    graphdef = nnx.graphdef(counts.abstract(gin.tree()))
  options = {'xla_backend_optimization_level': 0}
  tokens = TOKENS.astype(np.int32)
  return jax.jit(
    lambda params: nnx.merge(graphdef, params)({'decoder_input_tokens': tokens})[0],
    compiler_options=options,
  )


def assert_same_logits(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  text, params = inwards.load(path)
  with Mesh().use(jax.devices()[:1]):
    ours = compiled(text)(params)
  expected = expected_logits(tensors)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', FOLDERS)
def test_logits_of_a_packed_folder(kind, tmp_path):
  write, options = FOLDERS[kind]
  random = np.random.default_rng(zlib.crc32(kind.encode()))
  packed, plain = {}, {}
  for name, x in plain_tensors().items():
    stored, plain[name] = (
      ({name: x}, x) if x is not None else write(name[: -len('.weight')], random)
    )
    packed |= stored
  write_tensors(tmp_path / 'model.safetensors', packed)
  (tmp_path / 'config.json').write_text(json.dumps({**CONFIG, 'quantization_config': options}))
  assert_same_logits(tmp_path, plain)


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Through torch, since safetensors' numpy half knows no float8."""
  torch = pytest.importorskip('torch')
  from safetensors.torch import save_file

  def tensor(x):
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.float8_e4m3fn:
      return torch.tensor(x.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.tensor(x)

  save_file({name: tensor(x) for name, x in tensors.items()}, path)


# Where the bytes of a block's float16 scales lie in the K-quants, for which there is no packer in Python.
SCALES = {'Q2_K': (80, 82), 'Q3_K': (108,), 'Q4_K': (0, 2), 'Q5_K': (0, 2), 'Q6_K': (208,)}


def gguf_bytes(gguf, random, kind) -> np.ndarray:
  """A matrix [SIZE, SIZE] as a file holds it; where the package cannot round, any bytes with small scales."""
  if kind.name not in SCALES:
    return gguf.quantize(random.normal(0, 0.05, (SIZE, SIZE)).astype(np.float32), kind)
  size = gguf.GGML_QUANT_SIZES[kind][1]
  blocks = random.integers(0, 256, (SIZE, size)).astype(np.uint8)
  for place in SCALES[kind.name]:
    scales = random.uniform(0.00005, 0.0001, (SIZE, 1)).astype(np.float16)
    blocks[:, place : place + 2] = scales.view(np.uint8)
  return blocks


def halves_of_heads(x: np.ndarray) -> np.ndarray:
  """Rows of queries or keys as transformers rotates them: llama.cpp has the two of a pair side by side."""
  split = x.reshape(HEADS, SIZE // HEADS // 2, 2, SIZE)
  return split.swapaxes(1, 2).reshape(SIZE, SIZE)


@pytest.mark.parametrize(
  'kind',
  ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'F16', 'BF16'],
)
def test_logits_of_a_gguf_file(kind, tmp_path):
  gguf = pytest.importorskip('gguf')
  random = np.random.default_rng(zlib.crc32(kind.encode()))
  kind = gguf.GGMLQuantizationType[kind]
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama')
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(SIZE)
  writer.add_feed_forward_length(SIZE)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(HEADS)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_token_list([chr(0x100 + i) for i in range(32)])
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
  plain = {}
  for name, x in plain_tensors().items():
    theirs = names.get_name(name, try_suffixes=('.weight',))
    if x is not None:
      plain[name] = x
      writer.add_tensor(theirs, x)
      continue
    stored = gguf_bytes(gguf, random, kind)
    writer.add_tensor(theirs, stored, raw_dtype=kind)
    matrix = np.asarray(gguf.dequantize(stored, kind), np.float32).reshape(SIZE, SIZE)
    rotated = name.endswith(('q_proj.weight', 'k_proj.weight'))
    plain[name] = halves_of_heads(matrix) if rotated else matrix
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert_same_logits(tmp_path / 'model.gguf', plain)
