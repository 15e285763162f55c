"""Reads GGUF files, llama.cpp's format: they become the config.json and the tensors of a Hugging Face folder.

Every type of tensor that the `gguf` package dequantises is read: Q4_0 to Q8_0, K-quants, IQ, float. The
architectures are those whose tensors llama.cpp only renames or permutes. `gguf_tokenizer` reads the tokenizer.
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
# The keys of config.json that every architecture has, and GGUF's keys for them, below the architecture's name.
SIZES = {
  'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count', 'intermediate_size': 'feed_forward_length',
  'num_key_value_heads': 'attention.head_count_kv', 'max_position_embeddings': 'context_length',
}  # fmt: skip
FURTHER = ('attention.layer_norm_rms_epsilon', 'rope.freq_base', 'attention.key_length')
# Keys that follow from others, have an effect in llama.cpp alone, or are checked here.
IDLE = (
  'vocab_size',
  'rope.dimension_count',
  'attention.value_length',
  'attention.sliding_window',
  'rope.scaling.type',
)
# Further keys of an architecture's config.json; Gemma 3 has the windows of its layers, too.
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
# These norms multiply by one plus their scale, and llama.cpp stores the sum.
NORMS_ADD_ONE = ('gemma', 'gemma3')
# llama.cpp orders their channels so that neighbours are rotated together; in transformers these are the halves.
ROTATES_NEIGHBOURS = ('llama',)


class GGUF:
  """An open GGUF file.

  Args:
    path: of the file.

  Raises:
    UserError: the file is not GGUF, or its architecture is not supported.
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
    """Returns the value of a key, `default` if it is absent."""
    field = self.reader.fields.get(key)
    return default if field is None else field.contents()

  def setting(self, key: str, default=None):
    """Returns the value of a key below the architecture's name, `default` if it is absent."""
    return self.value(f'{self.architecture}.{key}', default)

  def config(self) -> dict:
    """Returns the same model's config.json.

    Raises:
      UserError: a key is missing, or has a value that is not supported.
    """
    self._check_keys()
    for key in SIZES.values():
      # Without a number of key heads there are as many as query heads.
      if self.setting(key) is None and key != SIZES['num_key_value_heads']:
        raise UserError(f'{self.path} has no {self.architecture}.{key}, so its model is not known.')
    config = {'vocab_size': len(self.value('tokenizer.ggml.tokens') or ())}
    config |= {hf: self.setting(key) for hf, key in SIZES.items()}
    config['num_key_value_heads'] = self.setting(
      SIZES['num_key_value_heads'], config['num_attention_heads']
    )
    # As a float32, 1e-5 is 9.9999997e-06. The decimal number is meant.
    config['rms_norm_eps'] = float(f'{self.setting("attention.layer_norm_rms_epsilon"):.6g}')
    config['rope_theta'] = self.setting('rope.freq_base', 10_000.0)
    names = {tensor.name for tensor in self.reader.tensors}
    config['tie_word_embeddings'] = 'output.weight' not in names
    size = self.setting(
      'attention.key_length', config['hidden_size'] // config['num_attention_heads']
    )
    if self.setting('rope.dimension_count', size) != size:
      raise UserError(
        f'{self.path}: {self.architecture} with rotary positions for a part of a head is not supported.'
      )
    return config | self._of_architecture(size) | self.special_ids()

  def _of_architecture(self, head_dim: int) -> dict:
    config = dict(ARCHITECTURES[self.architecture])
    if self.architecture not in WITHOUT_HEAD_SIZE:
      config['head_dim'] = head_dim
    if self.architecture not in WITH_WINDOWS:
      return config
    layers = self.setting('block_count')
    return config | {
      'query_pre_attn_scalar': head_dim, 'sliding_window': self.setting('attention.sliding_window'),
      # Every sixth layer attends to all tokens. llama.cpp has this, and the base of the others, in its code.
      'layer_types': ['sliding_attention' if (i + 1) % 6 else 'full_attention' for i in range(layers)],
      'rope_local_base_freq': 1e4,
    }  # fmt: skip

  def _check_keys(self) -> None:
    """Refuses a key of the architecture that is not read, unless its value is nothing."""
    prefix = f'{self.architecture}.'
    supported = {*SIZES.values(), *FURTHER, *IDLE}
    for key in self.reader.fields:
      is_other = key.startswith(prefix) and key.removeprefix(prefix) not in supported
      if is_other and self.value(key) not in (0, False, None):
        raise UserError(f'{self.path}: {key} = {self.value(key)!r} is not supported.')
    if self.setting('rope.scaling.type', 'none') != 'none':
      raise UserError(f'{self.path}: {prefix}rope.scaling.type is not supported.')

  def special_ids(self) -> dict:
    """Returns bos_token_id, eos_token_id and pad_token_id, as far as the file has them."""
    ids = {}
    for name, gguf_name in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
      value = self.value(f'tokenizer.ggml.{gguf_name}_token_id')
      if value is not None:
        ids[f'{name}_token_id'] = value
    return ids


class GGUFTensors(Mapping):
  """The float32 tensors of a GGUF file by transformers' names. Each is dequantised when it is asked for."""

  def __init__(self, file: GGUF):
    self.file = file
    self.sources = {}
    self.shapes = {}
    for tensor in file.reader.tensors:
      name = self._name(tensor.name)
      self.sources[name] = tensor
      self.shapes[name] = tuple(
        int(n) for n in tensor.shape[::-1]
      )  # GGUF has the fastest axis first

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
    """Undoes the changes that llama.cpp makes to transformers' tensors."""
    rotated = name.endswith(('attn_q.weight', 'attn_k.weight'))
    if rotated and self.file.architecture in ROTATES_NEIGHBOURS:
      key = 'attention.head_count' + ('_kv' if 'attn_k' in name else '')
      heads = self.file.setting(key, self.file.setting('attention.head_count'))
      return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    if self.file.architecture in NORMS_ADD_ONE and name.endswith('norm.weight'):
      return array - 1
    return array

  def rename(self, names: Mapping[str, str]) -> None:
    """Gives tensors other names, old to new."""
    self.sources = {names.get(name, name): tensor for name, tensor in self.sources.items()}
    self.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.sources or self.shapes[name] != self.shapes.get(other):
      return False
    return bool((self[name] == self[other]).all())

  def is_plain(self) -> bool:
    """True, since nothing is left for `packed.unpack`."""
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
