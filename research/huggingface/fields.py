"""Which keys of config.json and which gin bindings mean the same, in both directions.

Inwards, a field reads `Settings` and returns gin bindings. Outwards, it asks `get` for the value that a binding
has in the model to write (see `resolved.Resolved`), and returns keys of config.json.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError
from research.huggingface.harmless import is_same
from research.huggingface.names import Tree
from research.huggingface.settings import Settings

Get = Callable[[str], Any]


class Raw(str):
  """Text for the gin file as it stands, such as a reference, rather than a Python value."""


def _refused(settings: Settings) -> Any:
  """A null without a meaning: `Settings.__getitem__` refuses it."""


def _unchanged(value: Any) -> Any:
  return value


@dataclasses.dataclass(frozen=True)
class Field:
  """A key of config.json and the gin macro or binding that means the same.

  Attributes:
    hf, gin: the key, and the macro or binding.
    null: gives the meaning of a null from the settings; the key is refused where this gives None too.
    to_gin, to_hf: turn the value of one into that of the other.
  """

  hf: str
  gin: str
  null: Callable[[Settings], Any] = _refused
  to_gin: Callable[[Any], Any] = _unchanged
  to_hf: Callable[[Any], Any] = _unchanged

  def read(self, settings: Settings) -> dict[str, Any]:
    value = settings.get(self.hf)
    if value is None:
      value = self.null(settings)
    if value is None:
      value = settings[self.hf]  # raises the error that names the key
    return {self.gin: self.to_gin(value)}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: self.to_hf(get(self.gin))}


@dataclasses.dataclass(frozen=True)
class Optional:
  """A key whose null means none, so that the binding is None too."""

  hf: str
  gin: str

  def read(self, settings: Settings) -> dict[str, Any]:
    return {self.gin: settings.get(self.hf)}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: get(self.gin)}


@dataclasses.dataclass(frozen=True)
class Unused:
  """Keys without a binding: the family has no such part, or transformers computes the value from others."""

  keys: tuple[str, ...]

  def read(self, settings: Settings) -> dict[str, Any]:
    for key in self.keys:
      settings.get_or_refuse_null(key)
    return {}

  def write(self, get: Get) -> dict[str, Any]:
    return {}


def _nothing(source: Settings | Get) -> dict[str, Any]:
  return {}


@dataclasses.dataclass(frozen=True)
class Derived:
  """Bindings that follow from several keys, and keys that follow from the whole model.

  Attributes:
    read: gives bindings from the settings.
    write: gives keys of config.json from the model.
  """

  read: Callable[[Settings], dict[str, Any]] = _nothing
  write: Callable[[Get], dict[str, Any]] = _nothing


@dataclasses.dataclass(frozen=True)
class Implied:
  """A size that a part computes from the width. It is bound only where config.json has another value.

  Attributes:
    hf, gin: the key, and the binding.
    from_width: the rule of the part.
  """

  hf: str
  gin: str
  from_width: Callable[[int], int]

  def read(self, settings: Settings) -> dict[str, Any]:
    value = settings[self.hf]
    implied = value in ('auto', self.from_width(settings['hidden_size']))
    return {} if implied else {self.gin: value}

  def write(self, get: Get) -> dict[str, Any]:
    return {self.hf: get(self.gin) or self.from_width(get('EMBED'))}


def always(bindings: dict[str, Any]) -> Derived:
  """Bindings that every model of the family has."""

  def read(settings: Settings) -> dict[str, Any]:
    return bindings

  return Derived(read)


def equal(settings: Settings, key: str, value: Any) -> dict:
  """Refuses a key that is neither this value nor a null with that meaning. Returns no bindings.

  Raises:
    UserError: the key has another value.
  """
  in_file = settings.get_or_refuse_null(key)
  if in_file is not None and not is_same(in_file, value):
    raise UserError(
      f'config.json: {settings.model_type} with {settings.name(key)} = {in_file!r} is not supported, '
      f'only {value!r}.'
    )
  return {}


def computed(key: str) -> Derived:
  """Refuses a key that a class of transformers computes, so that no file may set it, not even to null."""

  def read(settings: Settings) -> dict[str, Any]:
    if settings.is_given(key):
      raise UserError(
        f'config.json: {settings.name(key)} of {settings.model_type} follows from other keys; take it out.'
      )
    return {}

  return Derived(read)


class Options(tuple):
  """The values of a key that all mean the same. The first is the one that is written."""


# Activations under each of the names that transformers has for them.
SILU = Options(('silu', 'swish'))
GELU = Options(('gelu', 'gelu_python'))


@dataclasses.dataclass(frozen=True)
class Family:
  """One row of the table of families.

  Attributes:
    model_type, architecture: as config.json says them.
    gin: our gin file of the family.
    fields: keys of config.json and the bindings that mean the same, as `Field` and its like.
    trees: names of the tensors of the layers.
    top: names of the tensors around the layers.
    when: keys that must have these values (`Options` for several). Another value is another row, or an error.
    ignore: regular expressions of tensors that old checkpoints have and the function does not depend on.
    prefix: begins the names of all tensors but the head's; files may leave it out.
    copies: tensors that a file may hold besides, and the tensors that they must be equal to.
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
  """The size of a head: the value of the key, or the width divided by the number of heads."""
  return settings.get('head_dim') or width(settings) // heads(settings)


def width(settings: Settings) -> int:
  """The size of the residual stream, for which families have different keys."""
  names = ('hidden_size', 'n_embd', 'd_model')
  return settings[next(name for name in names if name in settings.defaults)]


def heads(settings: Settings) -> int:
  """The number of query heads."""
  names = ('num_attention_heads', 'n_head', 'n_heads', 'num_heads')
  return settings[next(name for name in names if name in settings.defaults)]


def _read_head_dim(settings: Settings) -> dict[str, Any]:
  size = width(settings) // heads(settings)
  # transformers would rotate that many channels of a smaller head.
  equal(settings, 'head_dim', size)
  return {'HEAD_DIM': size}


def _head_dim_if_absent(settings: Settings) -> int | None:
  return None if settings.is_given('head_dim') else head_dim(settings)


# The classes of LLaMA, Mistral and Mixtral compute the size of a head from a null. The others fail on it.
HEAD_DIM_OR_NULL = Field('head_dim', 'HEAD_DIM', head_dim)
HEAD_DIM = Field('head_dim', 'HEAD_DIM', _head_dim_if_absent)
# For families whose heads share the width.
HEAD_DIM_ONLY_OURS = Derived(_read_head_dim)
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
