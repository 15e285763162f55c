"""Rotary positions: their keys in new and in old config files.

New files have one object, `rope_parameters`. Older ones have `rope_theta` and `rope_scaling` at the top level,
or keys of their family: `rotary_emb_base` and `rotary_pct` of GPT-NeoX, `partial_rotary_factor` of Phi and
StableLM.
"""

import math
from typing import Any

from research.core.errors import UserError
from research.huggingface.fields import Derived, Get, Raw, head_dim
from research.huggingface.settings import Settings

# For each kind of scaling our function, and its arguments with their keys.
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
  """Returns the rotary options as new files have them, in whichever keys this file has them."""
  scaling = settings.get('rope_scaling')
  parameters = settings.get('rope_parameters')
  # transformers prefers the old object where a file has both.
  rope = dict(scaling or parameters or {})
  if 'rotary_pct' in settings.defaults:  # GPT-NeoX
    theta = settings['rotary_emb_base']
    fraction = settings['rotary_pct']
  else:
    theta = settings['rope_theta']
    fraction = settings.get('partial_rotary_factor')
  rope.setdefault('rope_theta', theta)
  if fraction is not None:
    rope.setdefault('partial_rotary_factor', fraction)
  return settings.child('rope_scaling' if scaling else 'rope_parameters', rope)


def kind_of(rope: Settings) -> str:
  """Returns 'default' or the kind of scaling. The key was once called `type`."""
  old = rope.get('type', 'default')
  return rope.get('rope_type', old)


def read_rope(settings: Settings, rope: Settings, scope: str = '') -> dict[str, Any]:
  """Returns the bindings of rotary options.

  Args:
    settings: the whole config, whose length some scalings need.
    rope: the options, as `rope_of` gives them.
    scope: the gin scope to bind in, with its slash.

  Raises:
    UserError: the channels are odd, the base is not positive, or an option is not supported.
  """
  name = f'{scope}positions.rotary'
  bindings = {f'{name}.base': float(rope['rope_theta'])}
  fraction = _fraction(settings, rope)
  if fraction is not None:
    bindings[f'{name}.fraction'] = fraction
  _check_channels(settings, bindings[f'{name}.base'], 1.0 if fraction is None else fraction)
  kind = kind_of(rope)
  if kind == 'default':
    return {**bindings, f'{name}.scaling': None}
  if kind not in SCALINGS:
    raise UserError(
      f'config.json: the rotary scaling {kind!r} is not supported, only {", ".join(SCALINGS)}.'
    )
  function, _ = SCALINGS[kind]
  bindings[f'{name}.scaling'] = Raw(f'@{scope}positions.{function}')
  for argument, value in _scaling_arguments(settings, rope, kind).items():
    if value is not None:
      bindings[f'{scope}positions.{function}.{argument}'] = value
  return bindings


def _fraction(settings: Settings, rope: Settings) -> float | None:
  """The fraction of a head's channels that is rotated; None for a family that always rotates all."""
  fraction = rope.get('partial_rotary_factor')
  if 'partial_rotary_factor' in settings.defaults or 'rotary_pct' in settings.defaults:
    if rope.is_given('partial_rotary_factor'):
      rope['partial_rotary_factor']  # refuses a null
    return 1.0 if fraction is None else fraction
  if fraction not in (None, 1.0):
    raise UserError(
      f'config.json: partial_rotary_factor = {fraction} of {settings.model_type} is not supported, only 1.0.'
    )
  return None


def _check_channels(settings: Settings, base: float, fraction: float) -> None:
  is_latent = 'qk_rope_head_dim' in settings.defaults
  size = settings['qk_rope_head_dim'] if is_latent else head_dim(settings)
  rotated = int(size * fraction)
  if base <= 0 or rotated % 2 or not 0 < rotated <= size:
    raise UserError(
      f'config.json: rotary positions of {rotated} of {size} channels and base {base} '
      'are not supported: an even number of channels and a positive base are wanted.'
    )


def _scaling_arguments(settings: Settings, rope: Settings, kind: str) -> dict[str, Any]:
  """The arguments of our function for a kind of scaling; None leaves the function's default."""
  _, keys = SCALINGS[kind]
  values = {argument: rope.get(key) for argument, key in keys.items()}
  for argument in REQUIRED[kind]:
    values[argument] = rope[keys[argument]]
  if 'low' in values and values['low'] >= values['high']:
    raise UserError(
      f'config.json: low_freq_factor = {values["low"]} must be below high_freq_factor = {values["high"]}.'
    )
  if 'original_length' in values:
    values['original_length'] = _original_length(settings, rope, keys['original_length'])
  if kind == 'yarn':
    if values['factor'] is None and not rope.is_given('factor'):
      rope['factor']  # an absent factor is refused; a null means the ratio of the lengths
    if values['factor'] is None:
      values['factor'] = settings['max_position_embeddings'] / values['original_length']
    values['magnitude'] = _magnitude(rope, values['factor'])
    # transformers takes null and 0 for the defaults.
    for argument in ('fast', 'slow'):
      values[argument] = values[argument] or None
  return values


def _original_length(settings: Settings, rope: Settings, key: str) -> int:
  """The length that a model was trained with before its positions were scaled.

  transformers looks for it at the top level, then among the options, then takes the present length.
  """
  for place in (rope, settings):
    if place.is_given(key):
      place[key]  # refuses a null
  return settings.get(key) or rope.get(key) or settings['max_position_embeddings']


def grow(factor: float, scale: float = 1.0) -> float:
  """Returns YaRN's 0.1 scale ln(factor) + 1, and 1 for a factor of at most 1."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _magnitude(rope: Settings, factor: float) -> float:
  """The factor of cosines and sines (Peng et al. 2023, arXiv:2309.00071, section 3.4)."""
  attention_factor = rope.get('attention_factor')
  mscale = rope.get('mscale')
  mscale_all_dim = rope.get('mscale_all_dim')
  if attention_factor is not None:
    return attention_factor
  if mscale and mscale_all_dim:
    return grow(factor, mscale) / grow(factor, mscale_all_dim)
  return grow(factor)


def write_rope(get: Get) -> dict:
  """Returns the object `rope_parameters` of a model.

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
  # An absent fraction means that all channels are rotated.
  if get(f'{name}.fraction') != 1.0:
    rope['partial_rotary_factor'] = get(f'{name}.fraction')
  scaling = get(f'{name}.scaling')
  function = getattr(getattr(scaling, 'func', scaling), '__name__', '')
  for kind, (scaling_function, keys) in SCALINGS.items():
    if function == scaling_function:
      rope['rope_type'] = kind
      values = {key: get(f'positions.{function}.{argument}') for argument, key in keys.items()}
      rope |= {key: value for key, value in values.items() if value is not None}
  return rope


def _read(settings: Settings) -> dict[str, Any]:
  return read_rope(settings, rope_of(settings))


def _write(get: Get) -> dict[str, Any]:
  return {'rope_parameters': write_rope(get)}


ROPE = Derived(_read, _write)
