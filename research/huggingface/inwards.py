"""Hugging Face checkpoints to ours: config.json to gin, tensors to parameters, a tensor at a time."""

import importlib.util
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from research.core.errors import UserError, did_you_mean
from research.huggingface.companions import keep_companions
from research.huggingface.fields import Family, Options, Raw
from research.huggingface.files import Tensors
from research.huggingface.names import Tensor
from research.huggingface.packed import unpack
from research.huggingface.settings import Settings, is_same
from research.huggingface.sources import read_source

# What config.json can do to Python by being wrong: none of it is a reader's business to see.
NONSENSE = (
  TypeError,
  ValueError,
  KeyError,
  IndexError,
  AttributeError,
  ArithmeticError,
  RecursionError,
  MemoryError,
)
# Names that older versions of transformers gave to the same tensors.
RENAMED = {
  r'LayerNorm\.gamma$': 'LayerNorm.weight', r'LayerNorm\.beta$': 'LayerNorm.bias',
  r'^backbone\.embedding\.weight$': 'backbone.embeddings.weight',
}  # fmt: skip
LISTED = 12  # tensors named in one message
# Keys that say how many layers or experts there are: each of them has a tensor of its own, or a slice of one.
COUNTS = (
  'num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_decoder_layers',
  'num_experts', 'num_local_experts', 'n_routed_experts',
)  # fmt: skip
MANY = 10_000


def family_of(config: dict[str, Any]) -> tuple[Family, Settings]:
  """The row for a config.json, and the settings to read it with.

  Raises:
    UserError: no such family, or one of its options that is not supported, by name.
  """
  from research.huggingface.families import FAMILIES

  kind = config.get('model_type')
  rows = [family for family in FAMILIES if family.model_type == kind]
  if not rows:
    known = {family.model_type for family in FAMILIES}
    raise UserError(f'config.json: no family for model_type {kind!r}.{did_you_mean(kind, known)}')
  for family in rows:
    settings = Settings(config, kind)
    wrong = [
      key for key, wanted in family.when.items() if not _is_one_of(settings.get(key), wanted)
    ]
    if not wrong:
      return family, settings
  key = wrong[0]
  wanted = [row.when[key] for row in rows if key in row.when]
  values = [v for value in wanted for v in (value if isinstance(value, Options) else (value,))]
  raise UserError(
    f'config.json: {kind} with {key} = {Settings(config, kind).get(key)!r} is not supported, only '
    f'{" or ".join(dict.fromkeys(map(repr, values)))}.'
  )


def unlike(family: Family, settings: Settings) -> str | None:
  """The first key with another value than this row stands for; None where the row fits."""
  wrong = [key for key, wanted in family.when.items() if not _is_one_of(settings.get(key), wanted)]
  return wrong[0] if wrong else None


def _is_one_of(value, wanted) -> bool:
  options = wanted if isinstance(wanted, Options) else (wanted,)
  return any(is_same(value, option) for option in options)


def gin_text(family: Family, settings: Settings) -> str:
  """A gin file for the model of a config.json: the family's, and the values.

  Raises:
    UserError: a key that is missing, that has a value which makes no sense, or that nobody reads.
  """
  bindings = {}
  try:
    for field in family.fields:
      bindings.update(field.read(settings))
  except NONSENSE as error:
    raise UserError(
      f'config.json of {family.model_type} makes no sense: {_in_a_line(error)}.'
    ) from error
  settings.check_all_read()
  mentions = ' '.join(f'{k} {v if isinstance(v, Raw) else ""}' for k, v in bindings.items())
  named = re.findall(r'(?:^|[@/( ])(\w+)\.', mentions)
  modules = sorted({name for name in named if importlib.util.find_spec(f'research.model.{name}')})
  lines = [f'# {family.model_type}, from config.json.', 'from __gin__ import dynamic_registration']
  lines += ['import jax.nn'] + [f'from research.model import {name}' for name in modules]
  lines += [f"include '{family.gin}'", '']
  lines += [f'{k} = {v if isinstance(v, Raw) else repr(v)}' for k, v in bindings.items()]
  return '\n'.join(lines) + '\n'


def table(model, family: Family) -> list[Tensor]:
  """The tensors of this family for a model (a partial that needs only `rngs`).

  Raises:
    UserError: the table leaves a parameter out, by name.
  """
  from flax import nnx

  from research.huggingface import names
  from research.model import counts

  module = counts.abstract(model)
  tensors = names.tensors(module, family.trees, family.top)
  covered: dict[tuple, int] = {}
  for tensor in tensors:
    for piece in tensor.pieces:
      covered[piece.path] = covered.get(piece.path, 0) + math.prod(piece.shape)
  for path, param in nnx.to_flat_state(nnx.state(module)):
    if covered.get(path, 0) != math.prod(param.shape):
      name = '.'.join(map(str, path))
      raise UserError(
        f'{family.model_type} has no tensor for {name}: this model is not of that family.'
      )
  return tensors


def open_folder(folder: pathlib.Path) -> tuple[str, list[Tensor], Tensors]:
  """A Hugging Face checkpoint's gin text, the tensors that its model wants, and those in its files.

  Raises:
    UserError: as `load`.
  """
  from research.core import configs

  config, given = read_source(folder)
  quantisation = config.pop('quantization_config', None)
  family, settings = family_of(config)
  given.rename(_canonical(family, given))
  if quantisation is not None:
    if given.is_plain():
      raise UserError(
        f'{folder}: quantization_config of config.json says that the weights are packed, and no tensor of the '
        'files is; take it out to read them as they are.'
      )
    given = unpack(given, quantisation)
  _check_counts(folder, config, given)
  settings.tensors, settings.same_tensors = frozenset(given), given.same
  text = gin_text(family, settings)
  gin = configs.Config('MODEL')
  try:
    gin._read(text, 'model.gin')
    wanted = table(gin.tree(), family)
  except NONSENSE as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'{folder / "config.json"} describes no model that can be built: {_in_a_line(error)}.'
    ) from error
  _check_tensors(folder, family, settings, wanted, given)
  return text, wanted, given


def _in_a_line(error: BaseException) -> str:
  """The kind of an error and the first line of what it says."""
  return ': '.join((type(error).__name__, *str(error).splitlines()[:1])).rstrip('.')


def _check_counts(folder, config: dict[str, Any], given: Tensors) -> None:
  """Refuses more layers or experts than there are tensors, before a list of that length is made."""
  for key in COUNTS:
    count = config.get(key)
    if isinstance(count, int | float) and count > max(MANY, len(given)):
      raise UserError(
        f'{folder}: {key} = {count} of config.json is more than the {len(given)} tensors of the files can '
        'hold; correct the key, or download the missing files.'
      )


def _canonical(family: Family, given: Tensors) -> dict[str, str]:
  """Old names and names without the prefix of the family, to those that the tables have."""
  outside = tuple(
    name.split('.')[0] + '.' for name in family.top.values() if not name.startswith(family.prefix)
  )
  bare = family.prefix and not any(name.startswith(family.prefix) for name in given)
  names = {}
  for name in given:
    new = name if not bare or name.startswith(outside) else family.prefix + name
    for old, ending in RENAMED.items():
      new = re.sub(old, ending, new)
    if new != name and new not in given:
      names[name] = new
  return names


def _check_tensors(folder, family, settings, wanted, given) -> None:
  """Refuses tensors that are unknown, missing or misshapen, and copies that are none."""
  names = {tensor.name for tensor in wanted}
  ignored = [*family.ignore, *_extra_layers(settings)]
  unknown = [n for n in given if n not in names and not any(re.fullmatch(i, n) for i in ignored)]
  for name, original in family.copies.items():
    if name in unknown and given.same(name, original):
      unknown.remove(name)
    elif name in unknown and original in given:
      raise UserError(f'{folder}: {name} is not the copy of {original} that it should be.')
  # A head that is not wanted is equal to the token vectors: `heads.is_tied` compared them.
  unknown = [name for name in unknown if name != family.top.get('head.kernel')]
  problems = [f'{name} is missing' for name in sorted(names - given.keys())]
  problems += [f'{name} is unknown' for name in sorted(unknown)]
  problems += [
    f'{t.name} is {given.shapes[t.name]} and should be {t.shape}'
    for t in wanted
    if given.shapes.get(t.name, t.shape) != t.shape
  ]
  if problems:
    more = f'; and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
    raise UserError(
      f'{folder}: the tensors do not fit config.json: {"; ".join(problems[:LISTED])}{more}.'
    )


def _extra_layers(settings: Settings) -> list[str]:
  """Layers after the last that config.json announces: they predict further tokens (DeepSeek-V3)."""
  if 'num_nextn_predict_layers' not in settings.defaults:
    return []
  first = settings['num_hidden_layers']
  count = settings.get('num_nextn_predict_layers') or 0
  return [rf'model\.layers\.{i}\..*' for i in range(first, first + min(count, 100))]


def pieces(wanted, given) -> Iterator[tuple[tuple, tuple[int, ...], np.ndarray]]:
  """The path, the index on the leading axes and the values of every piece, a tensor at a time."""
  for tensor in wanted:
    for piece, value in zip(tensor.pieces, tensor.split(given[tensor.name]), strict=True):
      yield piece.path, piece.index, value


def _shapes(wanted) -> dict[tuple, tuple[int, ...]]:
  """The shape of every parameter, whose pieces have one index on each of the leading axes."""
  indices: dict[tuple, list] = {}
  for piece in (piece for tensor in wanted for piece in tensor.pieces):
    indices.setdefault(piece.path, []).append((piece.index, piece.shape))
  return {
    path: (*(max(i) + 1 for i in zip(*(index for index, _ in all_), strict=True)), *all_[0][1])
    for path, all_ in indices.items()
  }


def load(folder: str | pathlib.Path) -> tuple[str, dict]:
  """The gin text and the parameters (nested dicts, in memory) of a Hugging Face checkpoint.

  Args:
    folder: with config.json and safetensors; or a GGUF file.

  Raises:
    UserError: an unknown family or option; files that are missing or damaged; tensors that are unknown,
      missing or misshapen, listed.
  """
  from research.checkpoints import streamed

  text, wanted, given = open_folder(pathlib.Path(folder))
  arrays = {path: np.empty(shape, np.float32) for path, shape in _shapes(wanted).items()}
  for path, index, value in pieces(wanted, given):
    arrays[path][index] = value
  return text, streamed.nested(arrays)


def from_hf(folder: str | pathlib.Path, out: str | pathlib.Path) -> None:
  """Writes the checkpoint and the model.gin of a Hugging Face checkpoint, a tensor at a time.

  The tokenizer and the special ids go along, so that `outwards.save` can give them back.

  Raises:
    UserError: as `load`.
  """
  from research.checkpoints import streamed

  folder, out = pathlib.Path(folder), pathlib.Path(out)
  text, wanted, given = open_folder(folder)
  out.mkdir(parents=True, exist_ok=True)
  leading = {piece.path: len(piece.index) for tensor in wanted for piece in tensor.pieces}
  streamed.write_params(out, _shapes(wanted), leading, lambda: pieces(wanted, given))
  (out / 'model.gin').write_text(text)
  keep_companions(folder, out)
