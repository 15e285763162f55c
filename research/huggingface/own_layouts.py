"""Reads ChatGLM and Baichuan, whose releases have layouts of their own, as the families glm and llama.

Both came with their own code before transformers had these families. ChatGLM 2 and 3 are `glm` with queries,
keys and values in one tensor. Baichuan is `llama` with the same, and Baichuan 2 normalises its head's rows.
Their 4-bit layouts (ChatGLM2-6B-int4, Baichuan2-7B-Chat-4bits) are read as well.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.huggingface import packed_formulas as formulas
from research.huggingface.pickles import PickledTensors

# Keys without effect on the function, or checked here, in addition to those of every family (`harmless`).
IDLE = (
  'add_bias_linear', 'add_qkv_bias', 'apply_query_key_layer_scaling', 'attention_softmax_in_fp32',
  'apply_residual_connection_post_layernorm', 'bias_dropout_fusion', 'fp32_residual_connection',
  'interleaved_qkv', 'multi_query_attention', 'original_rope', 'post_layer_norm', 'rmsnorm', 'seq_length',
  'pre_seq_len', 'prefix_projection', 'z_loss_weight', 'quantization_bit',
)  # fmt: skip
# The values that ChatGLM's keys must have where a file has them.
CHATGLM = {
  'add_bias_linear': False, 'add_qkv_bias': True, 'apply_residual_connection_post_layernorm': False,
  'multi_query_attention': True, 'original_rope': True, 'post_layer_norm': True, 'rmsnorm': True,
  'interleaved_qkv': False, 'pre_seq_len': None, 'prefix_projection': False,
}  # fmt: skip
# Keys of ChatGLM's config.json, and those of glm's.
CHATGLM_SIZES = {
  'padded_vocab_size': 'vocab_size', 'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
  'ffn_hidden_size': 'intermediate_size', 'num_attention_heads': 'num_attention_heads',
  'multi_query_group_num': 'num_key_value_heads', 'kv_channels': 'head_dim',
  'layernorm_epsilon': 'rms_norm_eps',
}  # fmt: skip
CHATGLM_TOP = {
  'transformer.embedding.word_embeddings.weight': 'model.embed_tokens.weight',
  'transformer.encoder.final_layernorm.weight': 'model.norm.weight',
  'transformer.output_layer.weight': 'lm_head.weight',
}  # fmt: skip
CHATGLM_LAYER = {
  'input_layernorm': 'input_layernorm', 'post_attention_layernorm': 'post_attention_layernorm',
  'self_attention.dense': 'self_attn.o_proj', 'mlp.dense_h_to_4h': 'mlp.gate_up_proj',
  'mlp.dense_4h_to_h': 'mlp.down_proj',
}  # fmt: skip
QKV = ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')


class Rearranged(Mapping):
  """Tensors under other names, some cut out of others or changed. Each is made when it is asked for."""

  def __init__(self):
    self.makers: dict[str, Callable[[], np.ndarray]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}

  def add(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
    """Adds a tensor of this name and shape, which `make` returns."""
    self.makers[name] = make
    self.shapes[name] = tuple(shape)

  def add_renamed(self, name: str, source, old_name: str) -> None:
    """Adds a tensor of `source` under another name."""
    self.add(name, source.shapes[old_name], functools.partial(source.__getitem__, old_name))

  def add_parts(self, names: tuple[str, ...], rows: tuple[int, ...], source, name: str) -> None:
    """Adds the parts of one tensor, one after another along its rows."""
    if sum(rows) != source.shapes[name][0]:
      raise UserError(f'{name} has {source.shapes[name][0]} rows, and {sum(rows)} are expected.')
    start = 0
    for part, count in zip(names, rows, strict=True):
      shape = (count, *source.shapes[name][1:])
      self.add(part, shape, functools.partial(_rows, source, name, start, start + count))
      start += count

  def __getitem__(self, name: str) -> np.ndarray:
    return self.makers[name]()

  def rename(self, names: Mapping[str, str]) -> None:
    """Gives tensors other names, old to new."""
    self.makers = {names.get(name, name): make for name, make in self.makers.items()}
    self.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}

  def is_plain(self) -> bool:
    """True, since nothing is left for `packed.unpack`."""
    return True

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.shapes or self.shapes[name] != self.shapes.get(other):
      return False
    return bool((self[name] == self[other]).all())

  def __contains__(self, name) -> bool:
    return name in self.makers

  def __iter__(self) -> Iterator[str]:
    return iter(self.makers)

  def __len__(self) -> int:
    return len(self.makers)


def _rows(source, name: str, start: int, end: int) -> np.ndarray:
  return np.asarray(source[name])[start:end]


def translated(config: dict[str, Any], given) -> tuple[dict[str, Any], Any]:
  """Returns config.json and tensors, those of ChatGLM and Baichuan as glm's and llama's, any others unchanged.

  Raises:
    UserError: they have an option that is not supported.
  """
  kind = config.get('model_type')
  if kind not in LAYOUTS:
    return config, given
  unpack, translate = LAYOUTS[kind]
  return translate(config, unpack(config, given))


def _check(config: dict, supported: dict) -> None:
  for key, value in supported.items():
    if key in config and config[key] != value:
      raise UserError(
        f'config.json: {config["model_type"]} with {key} = {config[key]!r} is not supported, only {value!r}.'
      )


def _rest(config: dict, read) -> dict:
  """The keys that are not read here and may have an effect: the family accepts or refuses them."""
  skipped = {*read, *IDLE, 'model_type'}
  return {key: value for key, value in config.items() if key not in skipped}


def _chatglm(config: dict, given) -> tuple[dict, Rearranged]:
  _check(config, CHATGLM)
  missing = [key for key in CHATGLM_SIZES if key not in config]
  if missing:
    raise UserError(f'config.json of chatglm has no {missing[0]}.')
  ours = {new: config[old] for old, new in CHATGLM_SIZES.items()}
  ours |= {
    'model_type': 'glm', 'hidden_act': 'silu', 'attention_bias': True, 'partial_rotary_factor': 0.5,
    'rope_theta': 10_000.0 * config.get('rope_ratio', 1), 'tie_word_embeddings': False,
    'max_position_embeddings': config.get('seq_length', 32768),
  }  # fmt: skip
  read = (*CHATGLM_SIZES, 'rope_ratio', 'tie_word_embeddings', 'vocab_size')
  return _rest(config, read) | ours, _chatglm_tensors(config, given)


def _chatglm_tensors(config: dict, given) -> Rearranged:
  """The tensors of ChatGLM under glm's names; queries, keys and values become three."""
  tensors = Rearranged()
  heads = config['num_attention_heads'] * config['kv_channels']
  groups = config['multi_query_group_num'] * config['kv_channels']
  for name in given:
    if name in CHATGLM_TOP:
      tensors.add_renamed(CHATGLM_TOP[name], given, name)
      continue
    prefix = 'transformer.encoder.layers.'
    stem, _, ending = name.removeprefix(prefix).rpartition('.')
    layer, _, part = stem.partition('.')
    below = f'model.layers.{layer}.'
    if name.startswith(prefix) and part == 'self_attention.query_key_value':
      names = tuple(f'{below}{matrix}.{ending}' for matrix in QKV)
      tensors.add_parts(names, (heads, groups, groups), given, name)
    elif name.startswith(prefix) and part in CHATGLM_LAYER:
      tensors.add_renamed(f'{below}{CHATGLM_LAYER[part]}.{ending}', given, name)
    elif name != 'transformer.rotary_pos_emb.inv_freq':
      raise UserError(f'the tensor {name} is not one of chatglm.')
  return tensors


def _unpacked_chatglm(config: dict, given):
  """ChatGLM's tensors as matrices. `quantization_bit` of config.json says in how many bits they are."""
  from research.huggingface.packed import unpack

  bits = config.get('quantization_bit') or 0
  return unpack(given, {'quant_method': 'chatglm', 'bits': bits}) if bits else given


def _baichuan(config: dict, given) -> tuple[dict, Rearranged]:
  if 'max_position_embeddings' not in config:
    raise UserError(
      'config.json: baichuan without max_position_embeddings has ALiBi (13B), which llama has not; convert '
      'a 7B model.'
    )
  # Baichuan 2 is told by its larger vocabulary, as its own code does: the head's rows have length one.
  normalised = config.get('vocab_size') == 125696 or 'z_loss_weight' in config
  tensors = Rearranged()
  width = config['hidden_size']
  for name in given:
    if name.endswith('.self_attn.W_pack.weight'):
      below = name.removesuffix('self_attn.W_pack.weight')
      names = tuple(f'{below}{matrix}.weight' for matrix in QKV)
      tensors.add_parts(names, (width,) * 3, given, name)
    elif name == 'lm_head.weight' and normalised:
      make = functools.partial(_rows_of_length_one, given, name)
      tensors.add(name, given.shapes[name], make)
    elif not name.endswith('rotary_emb.inv_freq'):
      tensors.add_renamed(name, given, name)
  rest = _rest(config, ('quantization_config', 'tie_word_embeddings'))
  return rest | {'model_type': 'llama', 'tie_word_embeddings': False}, tensors


def _rows_of_length_one(source, name: str) -> np.ndarray:
  matrix = np.asarray(source[name], np.float32)
  return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)


def _unpacked_baichuan(config: dict, given):
  """Baichuan's tensors as matrices, also those of a 4-bit release.

  The pickle of a 4-bit release has 'X.weight.data' and 'X.weight.quant_state', a list of bitsandbytes 0.39:
  magnitudes, shape, dtype, block size, [offset, [magnitudes of the magnitudes, code book]], kind, code book.
  """
  states = getattr(given, 'others', {})
  if not isinstance(given, PickledTensors) or not states:
    return given
  tensors = Rearranged()
  for name in given:
    if name.endswith('.weight.data'):
      weight = name.removesuffix('.data')
      if f'{weight}.quant_state' not in states:
        raise UserError(f'{weight}.quant_state is missing; {weight} cannot be unpacked without it.')
      state = states.pop(f'{weight}.quant_state')
      tensors.add(weight, tuple(state[1]), functools.partial(_of_state, given, name, state))
    else:
      tensors.add_renamed(name, given, name)
  if states:
    raise UserError(f'the pickle holds {sorted(states)[0]}, which is no tensor and not known.')
  return tensors


def _of_state(source, name: str, state) -> np.ndarray:
  """The matrix of a packed tensor and its quant_state."""
  magnitudes, shape, _, blocksize, nested, kind, book = state
  if kind != 'nf4':
    raise UserError(f'a quant_state of kind {kind!r} is not read; only nf4 is.')
  of_magnitudes = None
  if nested is not None:
    offset, (second, second_book) = nested[0], nested[1][:2]
    size = nested[1][2] if len(nested[1]) > 2 else 256
    offset = offset.read() if hasattr(offset, 'read') else offset
    of_magnitudes = second_book.read(), second.read(), size, float(offset)
  return formulas.nested_blocks(
    source.raw(name), book.read(), magnitudes.read(), blocksize, tuple(shape), of_magnitudes
  )


# By model_type the function that unpacks the tensors, and the one that gives a family's config.json and names.
LAYOUTS = {
  'chatglm': (_unpacked_chatglm, _chatglm),
  'baichuan': (_unpacked_baichuan, _baichuan),
}
