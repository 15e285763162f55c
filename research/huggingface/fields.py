"""What keys of config.json and gin bindings say the same, in both directions.

Inwards a field reads `Settings` and gives gin bindings. Outwards it asks `get` what a binding is in the model
that is to be written (see `resolved.Resolved`), and gives keys of config.json.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError
from research.huggingface.names import Tree
from research.huggingface.settings import Settings, is_same

Get = Callable[[str], Any]


class Raw(str):
  """gin text rather than a Python value."""


def _refused(settings: Settings) -> Any:
  """A null that means nothing: `Settings.__getitem__` refuses it."""


@dataclasses.dataclass(frozen=True)
class Field:
  """A key of config.json and the gin macro or binding that says the same.

  `null` is what a null means, a function of the settings; where it gives None the key is refused.
  """

  hf: str
  gin: str
  null: Callable[[Settings], Any] = _refused
  to_gin: Callable[[Any], Any] = lambda value: value
  to_hf: Callable[[Any], Any] = lambda value: value

  def read(self, settings: Settings) -> dict[str, Any]:
    value = settings.get(self.hf)
    if value is None:
      value = self.null(settings)
    return {self.gin: self.to_gin(settings[self.hf] if value is None else value)}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: self.to_hf(get(self.gin))}


@dataclasses.dataclass(frozen=True)
class Optional:
  """A key whose null means none: the binding is None too."""

  hf: str
  gin: str

  def read(self, settings: Settings) -> dict[str, Any]:
    return {self.gin: settings.get(self.hf)}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: get(self.gin)}


@dataclasses.dataclass(frozen=True)
class Unused:
  """Keys of parts that the models of a family do not have, or that transformers computes from others."""

  keys: tuple[str, ...]

  def read(self, settings: Settings) -> dict[str, Any]:
    for key in self.keys:
      settings.get_or_refuse_null(key)
    return {}

  def write(self, get: Get) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Derived:
  """What gin must say and follows from several keys, and keys that follow from the model."""

  read: Callable[[Settings], dict[str, Any]] = lambda settings: {}
  write: Callable[[Get], dict[str, Any]] = lambda get: {}


@dataclasses.dataclass(frozen=True)
class Implied:
  """A size that a part computes from the width: bound only where config.json says another.

  `of` is the part's rule, of the width.
  """

  hf: str
  gin: str
  of: Callable[[int], int]

  def read(self, settings: Settings) -> dict[str, Any]:
    value = settings[self.hf]
    implied = value in ('auto', self.of(settings['hidden_size']))
    return {} if implied else {self.gin: value}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: get(self.gin) or self.of(get('EMBED'))}


def always(bindings: dict[str, Any]) -> Derived:
  """Bindings that hold for the whole family."""
  return Derived(lambda settings: bindings)


def equal(settings: Settings, key: str, value: Any) -> dict:
  """Refuses a key that is neither this value nor a null that means it. No bindings.

  Raises:
    UserError: another value.
  """
  given = settings.get_or_refuse_null(key)
  if given is not None and not is_same(given, value):
    raise UserError(
      f'config.json: {settings.model_type} with {settings.name(key)} = {given!r} is not supported, '
      f'only {value!r}.'
    )
  return {}


class Options(tuple):
  """The values of a key that all mean the same; the first is written."""


@dataclasses.dataclass(frozen=True)
class Family:
  """One row: what config.json calls the family, our gin file, and what corresponds.

  `when` are keys that config.json must have with these values (`Options` for several); another value is
  another row, or an error. `ignore` are tensors (regular expressions) that old checkpoints have and that say
  nothing. `prefix` begins the names of the model without its head: files may leave it out. `copies` are tensors
  that a file may hold besides those that they must be equal to.
  """

  model_type: str
  architecture: str
  gin: str
  fields: tuple
  trees: tuple[Tree, ...]
  top: dict[str, str]
  when: dict[str, Any] = dataclasses.field(default_factory=dict)
  ignore: tuple[str, ...] = (r'.*rotary_emb\.inv_freq',)
  prefix: str = 'model.'
  copies: dict[str, str] = dataclasses.field(default_factory=dict)


def head_dim(settings: Settings) -> int:
  """The size of a head: the key, or the width divided by the heads."""
  return settings.get('head_dim') or width(settings) // heads(settings)


def width(settings: Settings) -> int:
  """The size of the residual stream, which families call differently."""
  return settings[next(k for k in ('hidden_size', 'n_embd', 'd_model') if k in settings.defaults)]


def heads(settings: Settings) -> int:
  """The number of heads of the queries."""
  names = ('num_attention_heads', 'n_head', 'n_heads', 'num_heads')
  return settings[next(k for k in names if k in settings.defaults)]


HEAD_DIM = Field('head_dim', 'HEAD_DIM', head_dim)
HEAD_DIM_ONLY_OURS = Derived(lambda settings: {'HEAD_DIM': width(settings) // heads(settings)})
SIZES = (
  Field('vocab_size', 'VOCAB'),
  Field('hidden_size', 'EMBED'),
  Field('num_hidden_layers', 'LAYERS'),
  Field('num_attention_heads', 'HEADS'),
)
MLP = Field('intermediate_size', 'MLP')
KV_HEADS = Field('num_key_value_heads', 'KV_HEADS', heads)
RMS = Field('rms_norm_eps', 'layers.RMSNorm.epsilon')
LAYER_NORM = Field('layer_norm_epsilon', 'layers.LayerNorm.epsilon')
LAYER_NORM_EPS = Field('layer_norm_eps', 'layers.LayerNorm.epsilon')
ACTIVE = Field('num_experts_per_tok', 'ACTIVE')
NORMALISE = Field('norm_topk_prob', 'moe.Router.normalise')
