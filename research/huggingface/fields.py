"""What keys of config.json and gin bindings say the same, in both directions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError
from research.huggingface.names import Tree

Get = Callable[[str], Any]


class Raw(str):
  """gin text rather than a Python value."""


@dataclasses.dataclass(frozen=True)
class Field:
  """A key of config.json and the gin macro or binding that says the same.

  `default` is what an absent key means, a value or a function of the config.
  """

  hf: str
  gin: str
  default: Any = None
  to_gin: Callable[[Any], Any] = lambda value: value
  to_hf: Callable[[Any], Any] = lambda value: value

  def read(self, config: dict) -> dict[str, Any]:
    value = config.get(self.hf)
    if value is None:
      value = self.default(config) if callable(self.default) else self.default
    return {} if value is None else {self.gin: self.to_gin(value)}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: self.to_hf(get(self.gin))}


@dataclasses.dataclass(frozen=True)
class Derived:
  """What gin must say and follows from the config; or, with `hf`, the other way round."""

  read: Callable[[dict], dict[str, Any]] = lambda config: {}
  write: Callable[[Get], dict[str, Any]] = lambda get: {}


@dataclasses.dataclass(frozen=True)
class Implied:
  """A size that a part computes from the width: bound only where config.json says another.

  `of` is the part's rule, of the width.
  """

  hf: str
  gin: str
  of: Callable[[int], int]

  def read(self, config: dict) -> dict[str, Any]:
    value = config.get(self.hf)
    implied = value in (None, 'auto', self.of(config['hidden_size']))
    return {} if implied else {self.gin: value}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: get(self.gin) or self.of(get('EMBED'))}


def always(bindings: dict[str, Any]) -> Derived:
  return Derived(lambda config: bindings)


SCALINGS = {
  'llama3': ('llama3_scaling', {'factor': 'factor', 'low': 'low_freq_factor', 'high': 'high_freq_factor',
                                'original_length': 'original_max_position_embeddings'}),
  'linear': ('linear_scaling', {'factor': 'factor'}),
  'yarn': ('yarn_scaling', {'factor': 'factor', 'original_length': 'original_max_position_embeddings',
                            'fast': 'beta_fast', 'slow': 'beta_slow', 'magnitude': 'attention_factor'}),
}  # fmt: skip


def rope_of(config: dict) -> dict:
  """The rope parameters of new and of old config files."""
  rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
  rope.setdefault('rope_theta', config.get('rope_theta', 10_000.0))
  rope.setdefault('rope_type', rope.pop('type', 'default'))
  return rope


def read_rope(rope: dict, scope: str = '') -> dict[str, Any]:
  name, kind = f'{scope}positions.rotary', rope['rope_type']
  bindings = {f'{name}.base': float(rope['rope_theta'])}
  if 'partial_rotary_factor' in rope:
    bindings[f'{name}.fraction'] = rope['partial_rotary_factor']
  if kind == 'default':
    return {**bindings, f'{name}.scaling': None}
  if kind not in SCALINGS:
    raise UserError(
      f'config.json: no rotary scaling {kind!r} here; there are {", ".join(SCALINGS)}.'
    )
  function, keys = SCALINGS[kind]
  bindings[f'{name}.scaling'] = Raw(f'@{scope}positions.{function}')
  for ours, theirs in keys.items():
    if rope.get(theirs) is not None:
      bindings[f'{scope}positions.{function}.{ours}'] = rope[theirs]
  mscale = rope.get('mscale'), rope.get('mscale_all_dim')
  if kind == 'yarn' and all(mscale) and rope.get('attention_factor') is None:
    grow = lambda m: 0.1 * m * math.log(rope['factor']) + 1
    bindings[f'{scope}positions.yarn_scaling.magnitude'] = grow(mscale[0]) / grow(mscale[1])
  return bindings


def write_rope(get: Get, scope: str = '') -> dict:
  name = f'{scope}positions.rotary'
  rope = {'rope_theta': get(f'{name}.base'), 'rope_type': 'default'}
  if get(f'{name}.fraction') != 1.0:
    rope['partial_rotary_factor'] = get(f'{name}.fraction')
  scaling = get(f'{name}.scaling')
  for kind, (function, keys) in SCALINGS.items():
    if scaling is not None and str(scaling).endswith(function):
      rope['rope_type'] = kind
      values = {theirs: get(f'{scope}positions.{function}.{ours}') for ours, theirs in keys.items()}
      rope.update({k: v for k, v in values.items() if v is not None})
  return rope


ROPE = Derived(
  lambda config: read_rope(rope_of(config)), lambda get: {'rope_parameters': write_rope(get)}
)


def tied(default: bool) -> Derived:
  def read(config):
    is_tied = config.get('tie_word_embeddings', default)
    return {'models.LanguageModel.head': Raw('@heads.TiedHead' if is_tied else '@heads.UntiedHead')}

  def write(get):
    return {'tie_word_embeddings': str(get('models.LanguageModel.head')).endswith('TiedHead')}

  return Derived(read, write)


def head_dim(config):
  return config.get('head_dim') or _first(config, 'hidden_size', 'n_embd', 'd_model') // _first(
    config, 'num_attention_heads', 'n_head', 'n_heads'
  )


def _first(config, *keys):
  return next(config[key] for key in keys if config.get(key) is not None)


HEAD_DIM = Field('head_dim', 'HEAD_DIM', head_dim)
HEAD_DIM_ONLY_OURS = Derived(lambda config: {'HEAD_DIM': head_dim(config)})
SIZES = (
  Field('vocab_size', 'VOCAB'),
  Field('hidden_size', 'EMBED'),
  Field('num_hidden_layers', 'LAYERS'),
  Field('num_attention_heads', 'HEADS'),
)
MLP = Field('intermediate_size', 'MLP')
KV_HEADS = Derived(
  lambda c: {'KV_HEADS': c.get('num_key_value_heads') or c['num_attention_heads']},
  lambda get: {'num_key_value_heads': get('KV_HEADS') or get('HEADS')},
)
RMS = Field('rms_norm_eps', 'layers.RMSNorm.epsilon', 1e-6)
LAYER_NORM = Field('layer_norm_epsilon', 'layers.LayerNorm.epsilon', 1e-5)
LLAMA = (*SIZES, KV_HEADS, HEAD_DIM, MLP, RMS, ROPE)
WINDOW = Field('sliding_window', 'attention.Attention.window')


@dataclasses.dataclass(frozen=True)
class Family:
  """One row: what config.json calls the family, our gin file, and what corresponds.

  `when` are keys that config.json must have with these values; another value is another row, or an error.
  `ignore` are tensors (regular expressions) that old checkpoints have and that say nothing.
  """

  model_type: str
  architecture: str
  gin: str
  fields: tuple[Field | Implied | Derived, ...]
  trees: tuple[Tree, ...]
  top: dict[str, str]
  when: dict[str, Any] = dataclasses.field(default_factory=dict)
  ignore: tuple[str, ...] = (r'.*rotary_emb\.inv_freq',)
