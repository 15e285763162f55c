"""Rotary positions: their keys in new and in old config files.

New files have one object `rope_parameters`. Older ones have `rope_theta` and `rope_scaling` beside it, or the
names of their family: `rotary_emb_base` and `rotary_pct` of GPT-NeoX, `partial_rotary_factor` of Phi and
StableLM.
"""

import math
from typing import Any

from research.core.errors import UserError
from research.huggingface.fields import Derived, Get, Raw, head_dim
from research.huggingface.settings import Settings

# The kinds of scaling: our function, its arguments, and their keys.
SCALINGS = {
  'llama3': ('llama3_scaling', {'factor': 'factor', 'low': 'low_freq_factor', 'high': 'high_freq_factor',
                                'original_length': 'original_max_position_embeddings'}),
  'linear': ('linear_scaling', {'factor': 'factor'}),
  'yarn': ('yarn_scaling', {'factor': 'factor', 'original_length': 'original_max_position_embeddings',
                            'fast': 'beta_fast', 'slow': 'beta_slow', 'truncate': 'truncate',
                            'magnitude': 'attention_factor'}),
}  # fmt: skip
REQUIRED = {'llama3': ('factor', 'low', 'high'), 'linear': ('factor',), 'yarn': ()}


def rope_of(settings: Settings) -> Settings:
  """The rotary options as new files have them, whichever way this one says them."""
  # transformers lets an old object go before a new one.
  scaling, parameters = settings.get('rope_scaling'), settings.get('rope_parameters')
  rope = dict(scaling or parameters or {})
  theta, fraction = 'rope_theta', 'partial_rotary_factor'
  if 'rotary_pct' in settings.defaults:
    theta, fraction = 'rotary_emb_base', 'rotary_pct'
  rope.setdefault('rope_theta', settings[theta])
  value = settings[fraction] if fraction == 'rotary_pct' else settings.get(fraction)
  if value is not None:
    rope.setdefault('partial_rotary_factor', value)
  return settings.child('rope_scaling' if scaling else 'rope_parameters', rope)


def kind_of(rope: Settings) -> str:
  """'default', or the kind of scaling; `type` is its old name."""
  old = rope.get('type', 'default')
  return rope.get('rope_type', old)


def read_rope(settings: Settings, rope: Settings, scope: str = '') -> dict[str, Any]:
  """Bindings for rotary options.

  Args:
    settings: the whole config, whose length some scalings need.
    rope: the options.
    scope: the gin scope to bind in, with its slash.
  """
  name, kind = f'{scope}positions.rotary', kind_of(rope)
  bindings = {f'{name}.base': float(rope['rope_theta'])}
  fraction = rope.get('partial_rotary_factor')
  partial = 'partial_rotary_factor' in settings.defaults or 'rotary_pct' in settings.defaults
  if partial:
    if rope.is_given('partial_rotary_factor'):
      rope['partial_rotary_factor']  # refuses a null
    bindings[f'{name}.fraction'] = 1.0 if fraction is None else fraction
  elif fraction not in (None, 1.0):
    raise UserError(
      f'config.json: partial_rotary_factor = {fraction} of {settings.model_type} is not supported, only 1.0.'
    )
  latent = 'qk_rope_head_dim' in settings.defaults
  size = settings['qk_rope_head_dim'] if latent else head_dim(settings)
  rotated = int(size * bindings.get(f'{name}.fraction', 1.0))
  if bindings[f'{name}.base'] <= 0 or rotated % 2 or not 0 < rotated <= size:
    raise UserError(
      f'config.json: rotary positions of {rotated} of {size} channels and base {bindings[f"{name}.base"]} '
      'are not supported: an even number of channels and a positive base are wanted.'
    )
  if kind == 'default':
    return {**bindings, f'{name}.scaling': None}
  if kind not in SCALINGS:
    raise UserError(
      f'config.json: no rotary scaling {kind!r} here; there are {", ".join(SCALINGS)}.'
    )
  function, keys = SCALINGS[kind]
  bindings[f'{name}.scaling'] = Raw(f'@{scope}positions.{function}')
  values = {ours: rope.get(theirs) for ours, theirs in keys.items()}
  for ours in REQUIRED[kind]:
    values[ours] = rope[keys[ours]]
  if 'low' in values and values['low'] >= values['high']:
    raise UserError(
      f'config.json: low_freq_factor = {values["low"]} must be below high_freq_factor = {values["high"]}.'
    )
  if 'original_length' in values:
    if rope.is_given(keys['original_length']):
      rope[keys['original_length']]  # refuses a null
    if settings.is_given('original_max_position_embeddings'):
      settings['original_max_position_embeddings']  # so does this
    outside = settings.get('original_max_position_embeddings')
    values['original_length'] = (
      outside or values['original_length'] or settings['max_position_embeddings']
    )
  if kind == 'yarn':
    if values['factor'] is None and not rope.is_given('factor'):
      rope['factor']  # refuses
    if values['factor'] is None:
      values['factor'] = settings['max_position_embeddings'] / values['original_length']
    values['magnitude'] = _magnitude(rope, values['factor'])
    # A null or 0 means the default to transformers.
    values |= {name: values[name] or None for name in ('fast', 'slow')}
  bindings |= {f'{scope}positions.{function}.{k}': v for k, v in values.items() if v is not None}
  return bindings


def grow(factor: float, scale: float = 1.0) -> float:
  """YaRN's 0.1 s ln(factor) + 1."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _magnitude(rope: Settings, factor: float) -> float:
  """What cos and sin are multiplied with."""
  given = rope.get('attention_factor')
  mscale, all_dim = rope.get('mscale'), rope.get('mscale_all_dim')
  if given is not None:
    return given
  return grow(factor, mscale) / grow(factor, all_dim) if mscale and all_dim else grow(factor)


def write_rope(get: Get) -> dict:
  """The object `rope_parameters` of a model.

  Raises:
    UserError: the model has no rotary positions.
  """
  name = 'positions.rotary'
  if get(f'{name}.base') is None:
    raise UserError(
      'this model has no rotary positions, and every model of the family to write has: '
      'name a family with its positions in --model_type (ALiBi: bloom, mpt or falcon).'
    )
  rope = {'rope_theta': get(f'{name}.base'), 'rope_type': 'default'}
  if get(f'{name}.fraction') != 1.0:
    rope['partial_rotary_factor'] = get(f'{name}.fraction')
  scaling = get(f'{name}.scaling')
  function = getattr(getattr(scaling, 'func', scaling), '__name__', '')
  for kind, (theirs, keys) in SCALINGS.items():
    if function == theirs:
      rope['rope_type'] = kind
      values = {key: get(f'positions.{theirs}.{ours}') for ours, key in keys.items()}
      rope |= {k: v for k, v in values.items() if v is not None}
  return rope


ROPE = Derived(
  lambda settings: read_rope(settings, rope_of(settings)),
  lambda get: {'rope_parameters': write_rope(get)},
)
