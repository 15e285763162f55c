"""Reads Hugging Face checkpoints: config.json becomes gin, and tensors become parameters, one at a time."""

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
from research.huggingface.harmless import is_same
from research.huggingface.names import Tensor
from research.huggingface.packed import unpack
from research.huggingface.settings import Settings
from research.huggingface.sources import read_source

# The errors of Python that a wrong config.json can cause. They become one sentence.
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
# The keys for the number of layers or experts. Each of these has a tensor, or a slice of one, in the files.
COUNTS = (
  'num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_decoder_layers',
  'num_experts', 'num_local_experts', 'n_routed_experts',
)  # fmt: skip
MANY = 10_000  # layers or experts that a model may have, however few tensors its files hold


def family_of(config: dict[str, Any]) -> tuple[Family, Settings]:
  """Returns the row of the table of families for a config.json, and the settings to read it with.

  Raises:
    UserError: there is no such family, or it has an option that is not supported.
  """
  from research.huggingface.families import FAMILIES

  kind = config.get('model_type')
  rows = [family for family in FAMILIES if family.model_type == kind]
  if not rows:
    families = {family.model_type for family in FAMILIES}
    raise UserError(
      f'config.json: no family for model_type {kind!r}.{did_you_mean(kind, families)}'
    )
  for family in rows:
    settings = Settings(config, kind)
    key = unlike(family, settings)
    if key is None:
      return family, settings
  supported = [value for row in rows if key in row.when for value in _options(row.when[key])]
  raise UserError(
    f'config.json: {kind} with {key} = {settings.get(key)!r} is not supported, only '
    f'{" or ".join(dict.fromkeys(map(repr, supported)))}.'
  )


def unlike(family: Family, settings: Settings) -> str | None:
  """Returns the first key whose value is not the one that this row stands for; None where the row fits."""
  for key, condition in family.when.items():
    value = settings.get(key)
    if not any(is_same(value, option) for option in _options(condition)):
      return key
  return None


def _options(condition) -> tuple:
  """The values that a condition of `Family.when` allows."""
  return condition if isinstance(condition, Options) else (condition,)


def gin_text(family: Family, settings: Settings) -> str:
  """Returns a gin file for the model of a config.json: it includes the family's and binds the values.

  Raises:
    UserError: a key is missing, has a value that makes no sense, or is not read by anything.
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
  lines = [f'# {family.model_type}, from config.json.', 'from __gin__ import dynamic_registration']
  lines += ['import jax.nn']
  lines += [f'from research.model import {name}' for name in _modules(bindings)]
  lines += [f"include '{family.gin}'", '']
  for name, value in bindings.items():
    lines.append(f'{name} = {value if isinstance(value, Raw) else repr(value)}')
  return '\n'.join(lines) + '\n'


def _modules(bindings: dict[str, Any]) -> list[str]:
  """The modules of research.model that bindings mention: a gin file must import them itself."""
  text = ' '.join(f'{k} {v if isinstance(v, Raw) else ""}' for k, v in bindings.items())
  names = set(re.findall(r'(?:^|[@/( ])(\w+)\.', text))
  return sorted(name for name in names if importlib.util.find_spec(f'research.model.{name}'))


def table(model, family: Family) -> list[Tensor]:
  """Returns the tensors that a family has for a model.

  Args:
    model: a partial that needs only `rngs`.
    family: whose names the tensors get.

  Raises:
    UserError: the family has no tensor for a parameter of the model.
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
  """Opens a Hugging Face checkpoint.

  Returns:
    The gin text, the tensors that its model needs, and those in its files by name.

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
  settings.tensors = frozenset(given)
  settings.same_tensors = given.same
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
  """The class of an error and the first line of its message."""
  return ': '.join((type(error).__name__, *str(error).splitlines()[:1])).rstrip('.')


def _check_counts(folder, config: dict[str, Any], given: Tensors) -> None:
  """Refuses more layers or experts than there are tensors, before anything of that length is built."""
  for key in COUNTS:
    count = config.get(key)
    if isinstance(count, int | float) and count > max(MANY, len(given)):
      raise UserError(
        f'{folder}: {key} = {count} of config.json is more than the {len(given)} tensors of the files can '
        'hold; correct the key, or download the missing files.'
      )


def _canonical(family: Family, given: Tensors) -> dict[str, str]:
  """Maps old names, and names without the family's prefix, to the names in the tables."""
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
  """Refuses tensors that are unknown, missing or misshapen, and copies that differ from their original."""
  names = {tensor.name for tensor in wanted}
  ignored = [*family.ignore, *_extra_layers(settings)]
  unknown = [n for n in given if n not in names and not any(re.fullmatch(i, n) for i in ignored)]
  for name, original in family.copies.items():
    if name in unknown and given.same(name, original):
      unknown.remove(name)
    elif name in unknown and original in given:
      raise UserError(f'{folder}: {name} is not the copy of {original} that it should be.')
  # If the model has no head of its own, the head in the file equals the token vectors: `heads` compared them.
  unknown = [name for name in unknown if name != family.top.get('head.kernel')]
  missing = sorted(names - given.keys())
  _check_head(folder, family, missing)
  problems = [f'{name} is missing' for name in missing]
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


def _check_head(folder, family: Family, missing: list[str]) -> None:
  """Refuses a model that was saved without its head: it gives feature vectors, but no logits."""
  head = tuple(name for member, name in family.top.items() if member.startswith('head.'))
  if missing and all(name.startswith(head) for name in missing):
    raise UserError(
      f'{folder}: the files hold a model without its head ({missing[0]} is missing), which has no logits; '
      f'save it with its head, as {family.architecture} of transformers does.'
    )


def _extra_layers(settings: Settings) -> list[str]:
  """Expressions for the layers behind the last one, which predict further tokens (DeepSeek-V3)."""
  if 'num_nextn_predict_layers' not in settings.defaults:
    return []
  first = settings['num_hidden_layers']
  count = settings.get('num_nextn_predict_layers') or 0
  return [rf'model\.layers\.{i}\..*' for i in range(first, first + min(count, 100))]


def pieces(wanted, given) -> Iterator[tuple[tuple, tuple[int, ...], np.ndarray]]:
  """Yields the path, the index on the leading axes and the values of every piece, a tensor at a time."""
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
  """Returns the gin text and the parameters (nested dicts of float32, in memory) of a Hugging Face checkpoint.

  Args:
    folder: with config.json and safetensors; or a GGUF file.

  Raises:
    UserError: the family or an option is unknown, files are missing or damaged, or tensors are unknown,
      missing or misshapen; the message lists them.
  """
  from research.checkpoints import streamed

  text, wanted, given = open_folder(pathlib.Path(folder))
  arrays = {path: np.empty(shape, np.float32) for path, shape in _shapes(wanted).items()}
  for path, index, value in pieces(wanted, given):
    arrays[path][index] = value
  return text, streamed.nested(arrays)


def from_hf(folder: str | pathlib.Path, out: str | pathlib.Path) -> None:
  """Converts a Hugging Face checkpoint to a checkpoint of ours with its model.gin, a tensor at a time.

  The tokenizer and the special ids are kept too, so that `outwards.save` can write them again.

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
