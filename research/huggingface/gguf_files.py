"""GGUF files (llama.cpp's): the same config.json and tensors that the model has on Hugging Face.

Every tensor type that the `gguf` package dequantises is read: Q4_0 to Q8_0, K-quants, IQ, float. Architectures
are those whose tensors llama.cpp only renames or permutes. The tokenizer is `gguf_tokenizer`'s.
"""

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from research.core.errors import UserError, did_you_mean

INSTALL = 'the package gguf is not installed: uv sync --extra gguf (or pip install gguf).'
# llama.cpp's names of tensors and transformers' names, without the endings .weight and .bias.
OUTSIDE = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
INSIDE = {
  'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'attn_norm': 'input_layernorm', 'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj', 'ffn_norm': 'post_attention_layernorm',
}  # fmt: skip
GEMMA3 = {
  'post_attention_norm': 'post_attention_layernorm', 'ffn_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}  # fmt: skip
# The keys of a config.json that every architecture here has, and where GGUF keeps them below the architecture's
# name. The value of a key in brackets may be absent.
SIZES = {
  'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count', 'intermediate_size': 'feed_forward_length',
  'num_key_value_heads': 'attention.head_count_kv', 'max_position_embeddings': 'context_length',
}  # fmt: skip
FURTHER = ('attention.layer_norm_rms_epsilon', 'rope.freq_base', 'attention.key_length')
# Of an architecture's keys: what follows from others, or is about llama.cpp alone.
IDLE = (
  'vocab_size',
  'rope.dimension_count',
  'attention.value_length',
  'attention.sliding_window',
  'rope.scaling.type',
)
# What config.json says of an architecture beside its sizes; Gemma 3 adds the layers' windows.
SILU = {'hidden_act': 'silu'}
ARCHITECTURES = {
  'llama': {'model_type': 'llama', **SILU},
  'qwen2': {'model_type': 'qwen2', **SILU},
  'qwen3': {'model_type': 'qwen3', **SILU},
  'gemma': {'model_type': 'gemma', 'hidden_act': 'gelu_pytorch_tanh'},
  'gemma3': {'model_type': 'gemma3_text', 'hidden_activation': 'gelu_pytorch_tanh'},
}
WITHOUT_HEAD_SIZE = ('qwen2',)  # transformers' class has no head_dim
WITH_WINDOWS = ('gemma3',)
NORMS_ADD_ONE = ('gemma', 'gemma3')  # llama.cpp stores the sum
ROTATES_NEIGHBOURS = (
  'llama',
)  # as llama.cpp stores it; transformers rotates the two halves of a head


class GGUF:
  """An open file.

  Args:
    path: of the file.

  Raises:
    UserError: it is not GGUF, or of an architecture that is not read.
  """

  def __init__(self, path: pathlib.Path):
    try:
      import gguf
    except ImportError:
      raise UserError(INSTALL) from None
    try:
      self.reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
      raise UserError(f'{path} is not a whole GGUF file: {error}.') from None
    self.path = path
    self.architecture = self.value('general.architecture')
    if self.architecture not in ARCHITECTURES:
      hint = did_you_mean(self.architecture, ARCHITECTURES)
      raise UserError(f'{path}: GGUF architecture {self.architecture!r} is not supported.{hint}')

  def value(self, key: str, default=None):
    """The value of a key; `default` where it is absent."""
    field = self.reader.fields.get(key)
    return default if field is None else field.contents()

  def own(self, key: str, default=None):
    """The value of a key below the architecture's name."""
    return self.value(f'{self.architecture}.{key}', default)

  def config(self) -> dict:
    """The config.json that says the same.

    Raises:
      UserError: a key is missing, or one that says something which is not understood.
    """
    self._check_keys()
    missing = [f'{self.architecture}.{k}' for k in SIZES.values() if self.own(k) is None]
    missing = [key for key in missing if not key.endswith('head_count_kv')]
    if missing:
      raise UserError(f'{self.path} has no {missing[0]}, so its model is not known.')
    config = {'vocab_size': len(self.value('tokenizer.ggml.tokens') or ())}
    config |= {hf: self.own(key) for hf, key in SIZES.items()}
    config['num_key_value_heads'] = self.own(
      SIZES['num_key_value_heads'], config['num_attention_heads']
    )
    # float32 keeps 1e-5 as 9.9999997e-06; the decimal number is meant.
    config['rms_norm_eps'] = float(f'{self.own("attention.layer_norm_rms_epsilon"):.6g}')
    config['rope_theta'] = self.own('rope.freq_base', 10_000.0)
    names = {tensor.name for tensor in self.reader.tensors}
    config['tie_word_embeddings'] = 'output.weight' not in names
    size = self.own('attention.key_length', config['hidden_size'] // config['num_attention_heads'])
    if self.own('rope.dimension_count', size) != size:
      raise UserError(
        f'{self.path}: {self.architecture} that rotates a part of a head is not read.'
      )
    return config | self._of_architecture(size) | self.special_ids()

  def _of_architecture(self, head_dim: int) -> dict:
    config = dict(ARCHITECTURES[self.architecture])
    if self.architecture not in WITHOUT_HEAD_SIZE:
      config['head_dim'] = head_dim
    if self.architecture not in WITH_WINDOWS:
      return config
    layers = self.own('block_count')
    return config | {
      'query_pre_attn_scalar': head_dim, 'sliding_window': self.own('attention.sliding_window'),
      # Every sixth layer sees all; llama.cpp has this, and the base of the others, in its code.
      'layer_types': ['sliding_attention' if (i + 1) % 6 else 'full_attention' for i in range(layers)],
      'rope_local_base_freq': 1e4,
    }  # fmt: skip

  def _check_keys(self) -> None:
    prefix = f'{self.architecture}.'
    known = {*SIZES.values(), *FURTHER, *IDLE}
    for key in self.reader.fields:
      short = key.removeprefix(prefix)
      if key.startswith(prefix) and short not in known and self.value(key) not in (0, False, None):
        raise UserError(f'{self.path}: {key} = {self.value(key)!r} is not supported.')
    if self.own('rope.scaling.type', 'none') != 'none':
      raise UserError(f'{self.path}: {prefix}rope.scaling.type is not supported.')

  def special_ids(self) -> dict:
    """bos_token_id, eos_token_id and pad_token_id, those that are known."""
    ids = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}
    found = {f'{hf}_token_id': self.value(f'tokenizer.ggml.{k}_token_id') for hf, k in ids.items()}
    return {key: value for key, value in found.items() if value is not None}


class GGUFTensors(Mapping):
  """The tensors of a GGUF file under transformers' names, float32; each is dequantised when it is asked for."""

  def __init__(self, file: GGUF):
    self.file = file
    self.sources, self.shapes = {}, {}
    for tensor in file.reader.tensors:
      name = self._name(tensor.name)
      self.sources[name] = tensor
      self.shapes[name] = tuple(int(n) for n in tensor.shape[::-1])  # the fastest axis comes first

  def _name(self, name: str) -> str:
    stem, _, ending = name.rpartition('.')
    if stem in OUTSIDE:
      return f'{OUTSIDE[stem]}.{ending}'
    inside = INSIDE | (GEMMA3 if self.file.architecture in WITH_WINDOWS else {})
    parts = stem.split('.')
    if len(parts) == 3 and parts[0] == 'blk' and parts[2] in inside:
      return f'model.layers.{parts[1]}.{inside[parts[2]]}.{ending}'
    raise UserError(f'{self.file.path}: the tensor {name} is not one of {self.file.architecture}.')

  def __getitem__(self, name: str) -> np.ndarray:
    import gguf

    tensor = self.sources[name]
    array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    return self._undone(tensor.name, array.reshape(self.shapes[name]))

  def _undone(self, name: str, array: np.ndarray) -> np.ndarray:
    """Without what llama.cpp changes when it reads transformers' tensors."""
    rotated = name.endswith(('attn_q.weight', 'attn_k.weight'))
    if rotated and self.file.architecture in ROTATES_NEIGHBOURS:
      key = 'attention.head_count' + ('_kv' if 'attn_k' in name else '')
      heads = self.file.own(key, self.file.own('attention.head_count'))
      return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    if self.file.architecture in NORMS_ADD_ONE and name.endswith('norm.weight'):
      return array - 1  # it multiplies by the scale of a norm, Gemma by one more
    return array

  def rename(self, names: Mapping[str, str]) -> None:
    """Gives tensors other names, old to new."""
    for kept in (self.sources, self.shapes):
      renamed = {names.get(name, name): value for name, value in kept.items()}
      kept.clear()
      kept.update(renamed)

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.sources or self.shapes[name] != self.shapes.get(other):
      return False
    return bool((self[name] == self[other]).all())

  def is_plain(self) -> bool:
    """Nothing of it is left for `packed.unpack`."""
    return True

  def __contains__(self, name) -> bool:  # Mapping's own reads the tensor
    return name in self.sources

  def __iter__(self) -> Iterator[str]:
    return iter(self.sources)

  def __len__(self) -> int:
    return len(self.sources)


def is_gguf(path: pathlib.Path) -> bool:
  """Whether a path names a GGUF file."""
  return path.suffix == '.gguf'
