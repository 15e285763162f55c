"""Checkpoints that are no safetensors of transformers: GGUF, pickles, ChatGLM's and Baichuan's own layouts.

Each is made of a tiny folder of safetensors, by the rules of the other format, and must become its parameters.
"""

import collections
import json
import pathlib

import jax
import numpy as np
import pytest

from research.core import configs
from research.core.errors import UserError
from research.huggingface import files, inwards
from research.huggingface.pickles import PickledTensors

SIZES = {
  'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
  'vocab_size': 48, 'num_key_value_heads': 2, 'max_position_embeddings': 64, 'tie_word_embeddings': False,
}  # fmt: skip
LLAMA = {'model_type': 'llama', 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, **SIZES}
QWEN2 = {**LLAMA, 'model_type': 'qwen2'}
GLM = {
  'model_type': 'glm', 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'head_dim': 8, 'attention_bias': True,
  'partial_rotary_factor': 0.5, 'rope_theta': 10_000.0, **SIZES,
}  # fmt: skip


def write_folder(path: pathlib.Path, config: dict, change=lambda name, x: x) -> dict:
  """A folder of safetensors with random numbers; its tensors by name."""
  family, settings = inwards.family_of(dict(config))
  settings.tensors = frozenset(['lm_head.weight'])
  gin = configs.Config('MODEL')
  gin._read(inwards.gin_text(family, settings), 'model.gin')
  random = np.random.default_rng(0)
  tensors = {}
  for tensor in inwards.table(gin.tree(), family):
    drawn = random.normal(size=tensor.shape).astype(np.float32)
    tensors[tensor.name] = change(tensor.name, drawn)
  path.mkdir()
  files.write_tensors(path, tensors.items(), {k: v.shape for k, v in tensors.items()}, 'float32')
  (path / 'config.json').write_text(json.dumps(config))
  return tensors


def assert_same_model(path, reference, atol=0.0) -> None:
  text, params = inwards.load(path)
  expected_text, expected = inwards.load(reference)
  assert sorted(text.splitlines()) == sorted(expected_text.splitlines())
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol)
  jax.tree.map(compare, params, expected)


def rotated_in_pairs(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of queries or keys in the order in which llama.cpp rotates: neighbours, and not halves of a head."""
  half = x.shape[0] // heads // 2
  rows = [h * 2 * half + i + k * half for h in range(heads) for i in range(half) for k in range(2)]
  return x[rows]


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ('config', 'kind'),
  [(LLAMA, 'Q8_0'), slow(LLAMA, 'Q4_1'), slow(QWEN2, 'Q5_0'), slow(QWEN2, 'F16')],
)
def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path, config, kind):
  gguf = pytest.importorskip('gguf')
  kind = gguf.GGMLQuantizationType[kind]
  stored = {}

  def as_stored(name, x):
    if x.ndim == 1 or 'embed' in name:
      return x
    heads = {'q_proj': 4, 'k_proj': 2}.get(name.split('.')[-2])
    if config is LLAMA and heads:
      # What the file holds is rounded in its own order, which is the same within a row.
      stored[name] = gguf.quantize(rotated_in_pairs(x, heads), kind)
    else:
      stored[name] = gguf.quantize(x, kind)
    return np.asarray(gguf.dequantize(gguf.quantize(x, kind), kind), np.float32).reshape(x.shape)

  tensors = write_folder(tmp_path / 'plain', config, as_stored)
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', config['model_type'])
  writer.add_block_count(2)
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('qwen2')
  words = [chr(0x100 + i) for i in range(48)]
  words[2] = words[0] + words[1]
  writer.add_token_list(words)
  writer.add_token_types([1] * 48)
  writer.add_token_merges([f'{words[0]} {words[1]}'])
  writer.add_eos_token_id(7)
  name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config['model_type'].upper()], 2)
  for name, x in tensors.items():
    ours = name_map.get_name(name, try_suffixes=('.weight', '.bias'))
    if name in stored:
      writer.add_tensor(ours, stored[name], raw_dtype=kind)
    else:
      writer.add_tensor(ours, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert_same_model(tmp_path / 'model.gguf', tmp_path / 'plain')
  inwards.from_hf(tmp_path / 'model.gguf', tmp_path / 'out')
  assert (
    json.loads((tmp_path / 'out/huggingface/special_ids.json').read_text())['eos_token_id'] == 7
  )
  assert (tmp_path / 'out/huggingface/tokenizer.json').is_file()


def test_what_a_gguf_file_says_and_is_not_understood_is_told(tmp_path):
  gguf = pytest.importorskip('gguf')
  path = tmp_path / 'model.gguf'
  path.write_bytes(b'GGUF but cut')
  with pytest.raises(UserError, match='is not a whole GGUF file'):
    inwards.load(path)
  for architecture, key, says in (
    ('falcon', None, "'falcon' is not supported"),
    ('llama', 'llama.expert_count', 'llama.expert_count = 8 is not supported'),
  ):
    writer = gguf.GGUFWriter(path, architecture)
    if key:
      writer.add_uint32(key, 8)
    writer.add_tensor('token_embd.weight', np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=says):
      inwards.load(path)


def chatglm_of(tensors: dict) -> dict:
  """The same tensors as ChatGLM names and fuses them."""
  renamed = {
    'transformer.embedding.word_embeddings.weight': tensors['model.embed_tokens.weight'],
    'transformer.encoder.final_layernorm.weight': tensors['model.norm.weight'],
    'transformer.output_layer.weight': tensors['lm_head.weight'],
    'transformer.rotary_pos_emb.inv_freq': np.ones(2, np.float32),
  }
  for i in range(2):
    ours, theirs = f'model.layers.{i}.', f'transformer.encoder.layers.{i}.'
    for ending in ('weight', 'bias'):
      parts = [tensors[f'{ours}self_attn.{k}_proj.{ending}'] for k in 'qkv']
      renamed[f'{theirs}self_attention.query_key_value.{ending}'] = np.concatenate(parts)
    for new, old in (
      ('input_layernorm', 'input_layernorm'), ('self_attention.dense', 'self_attn.o_proj'),
      ('post_attention_layernorm', 'post_attention_layernorm'),
      ('mlp.dense_h_to_4h', 'mlp.gate_up_proj'), ('mlp.dense_4h_to_h', 'mlp.down_proj'),
    ):  # fmt: skip
      renamed[f'{theirs}{new}.weight'] = tensors[f'{ours}{old}.weight']
  return renamed


CHATGLM = {
  'model_type': 'chatglm', 'padded_vocab_size': 48, 'hidden_size': 32, 'num_layers': 2, 'ffn_hidden_size': 64,
  'num_attention_heads': 4, 'multi_query_group_num': 2, 'multi_query_attention': True, 'kv_channels': 8,
  'layernorm_epsilon': 1e-5, 'rmsnorm': True, 'add_qkv_bias': True, 'add_bias_linear': False,
  'original_rope': True, 'seq_length': 64, 'post_layer_norm': True,
  'apply_residual_connection_post_layernorm': False, 'fp32_residual_connection': False,
}  # fmt: skip


@pytest.mark.parametrize('bits', [slow(None), 4, slow(8)])
def test_chatglm_is_the_glm_that_it_is(tmp_path, bits):
  from safetensors.numpy import save_file

  top = None if bits is None else 2 ** (bits - 1) - 1
  packed = {}

  def rounded(name, x):
    if bits is None or not name.endswith('_proj.weight'):
      return x
    scale = (np.abs(x).max(1) / top).astype(np.float16)
    whole = np.round(x / scale[:, None].astype(np.float32)).clip(-top, top)
    packed[name] = whole.astype(np.int8), scale
    return whole * scale.astype(np.float32)[:, None]

  tensors = write_folder(tmp_path / 'plain', GLM, rounded)
  theirs = chatglm_of(tensors)
  if bits is not None:
    codes = chatglm_of({name: packed.get(name, (x, None))[0] for name, x in tensors.items()})
    none = lambda x: np.zeros(len(x), np.float16)
    scales = chatglm_of({n: packed.get(n, (None, none(x)))[1] for n, x in tensors.items()})
    for name in [n for n in theirs if n.endswith('.weight') and codes[n].dtype == np.int8]:
      numbers = codes[name]
      if bits == 4:
        numbers = ((numbers[:, ::2] << 4) | (numbers[:, 1::2] & 15)).astype(np.int8)
      theirs[name] = numbers
      theirs[f'{name}_scale'] = scales[name]
  (tmp_path / 'theirs').mkdir()
  save_file(theirs, tmp_path / 'theirs' / 'model.safetensors')
  config = CHATGLM | ({} if bits is None else {'quantization_bit': bits})
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(config))
  assert_same_model(tmp_path / 'theirs', tmp_path / 'plain', atol=1e-6)
  for key, value in (('rmsnorm', False), ('pre_seq_len', 8)):
    (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f'chatglm with {key} = {value}'):
      inwards.load(tmp_path / 'theirs')


BAICHUAN = {
  'model_type': 'baichuan', 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'z_loss_weight': 0, **SIZES,
}  # fmt: skip
del BAICHUAN['num_key_value_heads']


@pytest.mark.slow
def test_baichuan_2_in_four_bits_is_the_llama_that_it_is(tmp_path):
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes.functional')
  states, packed = {}, {}

  def rounded(name, x):
    if name == 'lm_head.weight':
      return x / np.linalg.norm(x, axis=1, keepdims=True)
    return x if 'proj' not in name or '.self_attn.' in name else four_bits(name, x)

  def four_bits(name, x):
    whole = torch.tensor(x)
    packed[name], state = bnb.quantize_4bit(whole, quant_type='nf4', compress_statistics=True)
    nested = [state.offset, [state.state2.absmax, state.state2.code]]
    shape = torch.Size(x.shape)
    states[name] = [
      state.absmax, shape, torch.float16, state.blocksize, nested, 'nf4', state.code,
    ]  # fmt: skip
    return bnb.dequantize_4bit(packed[name], state).numpy()

  llama = {**LLAMA, 'num_key_value_heads': 4}
  tensors = write_folder(tmp_path / 'plain', llama, rounded)
  theirs = collections.OrderedDict()
  for name, x in tensors.items():
    if name in packed:
      theirs[f'{name}.data'], theirs[f'{name}.quant_state'] = packed[name], states[name]
    elif 'q_proj' in name:
      parts = [tensors[name.replace('q_proj', f'{k}_proj')] for k in 'qkv']
      fused = torch.tensor(np.concatenate(parts)).to(torch.float32)
      theirs[name.replace('q_proj', 'W_pack')] = torch.nn.Parameter(fused)
    elif 'k_proj' not in name and 'v_proj' not in name:
      scale = 3.0 if name == 'lm_head.weight' else 1.0  # of no effect on its normalised rows
      theirs[name] = torch.tensor(x) * scale
  (tmp_path / 'theirs').mkdir()
  torch.save(theirs, tmp_path / 'theirs' / 'pytorch_model.bin')
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(BAICHUAN))
  assert packed
  assert_same_model(tmp_path / 'theirs', tmp_path / 'plain', atol=1e-6)
  alibi = {key: value for key, value in BAICHUAN.items() if key != 'max_position_embeddings'}
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(alibi))
  with pytest.raises(UserError, match='has ALiBi'):
    inwards.load(tmp_path / 'theirs')


class Harmful:
  """What runs a command when it is unpickled."""

  def __reduce__(self):
    return eval, ("__import__('pathlib').Path('/tmp/isoflop-was-here').touch()",)


def test_a_pickle_is_read_and_never_run(tmp_path):
  torch = pytest.importorskip('torch')
  whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  kinds = {'half': whole.half(), 'bfloat16': whole.bfloat16(), 'int': whole.int()}
  views = {'whole': whole, 'turned': whole.T, 'part': whole[1:3, 2:]}
  torch.save(kinds | views, tmp_path / 'pytorch_model.bin')
  tensors = PickledTensors(tmp_path)
  for name, value in (kinds | views).items():
    np.testing.assert_array_equal(tensors.raw(name).astype(np.float32), value.float().numpy())
  assert not tensors.is_plain()
  with pytest.raises(UserError, match='int is int32'):
    tensors['int']
  mark = pathlib.Path('/tmp/isoflop-was-here')
  mark.unlink(missing_ok=True)
  torch.save({'whole': whole, 'harm': Harmful()}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(UserError, match=r'asks for .*eval, which no file of tensors needs'):
    PickledTensors(tmp_path)
  assert not mark.exists()
  (tmp_path / 'pytorch_model.bin').write_bytes(b'not a zip')
  with pytest.raises(UserError, match='download it again'):
    PickledTensors(tmp_path)
