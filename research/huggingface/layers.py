"""Which layers attend to all tokens and which to a window: `layer_types`, and the keys of older configs for it.

A pattern of layers becomes a period that a stack repeats, and a remainder. Gemma 2 alternates, Gemma 3 has five
layers with a window before each one without, and Qwen's may come in any order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError
from research.huggingface.fields import Get, Raw
from research.huggingface.settings import Settings

FULL, SLIDING = 'full_attention', 'sliding_attention'


def period_of(kinds: list[str]) -> tuple[list[str], int, list[str]]:
  """Returns (period, repeats, rest) of a pattern: the shortest period, and what follows its last repetition."""
  best = (kinds, 1, [])
  for size in range(1, len(kinds)):
    repeats = len(kinds) // size
    rest = kinds[repeats * size :]
    # What counts is how many kinds of layers a program has: a rest of equal layers is one more, however long.
    shorter = size + len(set(rest)) < len(best[0]) + len(set(best[2]))
    if kinds[:size] * repeats == kinds[: repeats * size] and shorter:
      best = (kinds[:size], repeats, rest)
  return best


def stacks(kinds: list[str], part: str, norm: str = '@layers.RMSNorm') -> dict[str, Any]:
  """Returns the bindings of a stack with these kinds of layers, each attention and then `part` ('@mlp.Mlp').

  A layer with a window takes its attention from the scope `local`.
  """
  period, repeats, rest = period_of(kinds)
  bindings = {'stack.Stack.parts': _parts_of(period, part), 'stack.Stack.repeats': repeats}
  if not rest:
    return {
      **bindings, 'models.LanguageModel.stack': Raw('@stack.Stack'), 'stack.Stack.norm': Raw(norm),
    }  # fmt: skip
  alike = len(set(rest)) == 1
  return {
    **bindings, 'models.LanguageModel.stack': Raw('@stack.Stacks'),
    'stack.Stacks.stacks': Raw('(@stack.Stack, @rest/stack.Stack)'),
    'stack.Stacks.norm': Raw(norm), 'stack.Stack.norm': None,
    'rest/stack.Stack.parts': _parts_of(rest[:1] if alike else rest, part),
    'rest/stack.Stack.repeats': len(rest) if alike else 1,
  }  # fmt: skip


def _parts_of(kinds: list[str], part: str) -> Raw:
  """The gin tuple of the parts of these layers."""
  attention = {FULL: '@attention.Attention', SLIDING: '@local/attention.Attention'}
  return Raw('(' + ', '.join(f'{attention[kind]}, {part}' for kind in kinds) + ')')


def _last_layers(settings: Settings) -> list[str]:
  """Qwen 2 and 3: the layers from `max_window_layers` on have a window."""
  first = settings['max_window_layers'] if settings.get('use_sliding_window') else 1 << 30
  window = settings.get('sliding_window')
  return [
    SLIDING if window is not None and i >= first else FULL
    for i in range(settings['num_hidden_layers'])
  ]


def _every_second_first_layer(settings: Settings) -> list[str]:
  """Qwen 2 MoE: every second of the first `max_window_layers` has a window."""
  last = settings['max_window_layers'] if settings.get('use_sliding_window') else 0
  return [
    SLIDING if i % 2 == 0 and i < last else FULL for i in range(settings['num_hidden_layers'])
  ]


def _every_layer(settings: Settings) -> list[str]:
  """Qwen 3 MoE: all layers have a window, or none has."""
  with_window = settings.get('use_sliding_window') and settings.get('sliding_window') is not None
  return [SLIDING if with_window else FULL] * settings['num_hidden_layers']


def _alternating(settings: Settings) -> list[str]:
  """Gemma 2: the first layer and every second one after it have a window."""
  return [SLIDING if i % 2 == 0 else FULL for i in range(settings['num_hidden_layers'])]


def _all_but_one(settings: Settings) -> list[str]:
  """Gemma 3: all but every sixth layer have a window."""
  pattern = settings['sliding_window_pattern']
  return [SLIDING if (i + 1) % pattern else FULL for i in range(settings['num_hidden_layers'])]


@dataclasses.dataclass(frozen=True)
class LayerTypes:
  """The keys that say which layers have a window.

  Attributes:
    default: gives the pattern where `layer_types` is absent or null.
    part: the part behind attention in a layer.
    listed: whether the family has the key `layer_types`.
    switched: whether the family has `use_sliding_window`, which turns the window off.
  """

  default: Callable[[Settings], list[str]]
  part: str = '@mlp.Mlp'
  listed: bool = True
  switched: bool = True

  def read(self, settings: Settings) -> dict[str, Any]:
    kinds = settings.get('layer_types') if self.listed else None
    default = self.default(settings)
    # These have no effect where `layer_types` is there, and the default has read them where it is not.
    for key in ('max_window_layers', 'sliding_window_pattern', '_sliding_window_pattern'):
      settings.get_or_refuse_null(key)
    if self.switched:
      settings.get_or_refuse_null('use_sliding_window')
    kinds = default if kinds is None else kinds
    count = settings['num_hidden_layers']
    if len(kinds) != count or not set(kinds) <= {FULL, SLIDING}:
      raise UserError(
        f'config.json: layer_types = {kinds!r} is not supported: {count} of {FULL!r} and {SLIDING!r} '
        'are wanted.'
      )
    window = settings.get('sliding_window')
    if self.switched and not settings.get('use_sliding_window'):
      window = None
    if SLIDING in kinds and not window:
      raise UserError(
        f'config.json: layer_types has {SLIDING!r}, but sliding_window (with use_sliding_window) '
        'gives no window.'
      )
    if self.switched and len(set(kinds)) == 1:  # the family's own stack
      uniform = {'LAYERS': count}
      return {**uniform, 'attention.Attention.window': window} if SLIDING in kinds else uniform
    bindings = stacks(kinds, self.part)
    return (
      {**bindings, 'local/attention.Attention.window': window} if SLIDING in kinds else bindings
    )

  def write(self, get: Get) -> dict[str, Any]:
    windows = [attention.get('window') for attention in get.attentions()]
    kinds = [SLIDING if window else FULL for window in windows]
    window = next(filter(None, windows), None)
    config = {'num_hidden_layers': len(windows)}
    if window is not None:
      config['sliding_window'] = window
    if self.listed:
      config['layer_types'] = kinds
    if self.switched:
      config['use_sliding_window'] = window is not None
    return config


LAST_LAYERS = LayerTypes(_last_layers)
FIRST_LAYERS = LayerTypes(_every_second_first_layer, part='@moe.MoE')
EVERY_LAYER = LayerTypes(_every_layer, part='@moe.MoE', listed=False)
ALTERNATING = LayerTypes(_alternating, switched=False)
ALL_BUT_ONE = LayerTypes(_all_but_one, switched=False)
