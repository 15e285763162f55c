"""Reads Hugging Face checkpoints: config.json becomes gin, and tensors become parameters, one at a time."""

import importlib.util
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from research.core.errors import UserError, did_you_mean, in_a_line
from research.huggingface.companions import keep_companions
from research.huggingface.fields import Family, Options, Raw
from research.huggingface.files import Tensors
from research.huggingface.harmless import is_same
from research.huggingface.names import Tensor
from research.huggingface.packed import unpack
from research.huggingface.settings import Settings
from research.huggingface.sources import read_source
from research.huggingface.tensor_checks import canonical_names, check_counts, check_tensors

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
      f'config.json of {family.model_type} makes no sense: {in_a_line(error)}.'
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
  given.rename(canonical_names(family, given))
  if quantisation is not None:
    if given.is_plain():
      raise UserError(
        f'{folder}: quantization_config of config.json says that the weights are packed, and no tensor of the '
        'files is; take it out to read them as they are.'
      )
    given = unpack(given, quantisation)
  check_counts(folder, config, given)
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
      f'{folder / "config.json"} describes no model that can be built: {in_a_line(error)}.'
    ) from error
  check_tensors(folder, family, settings, wanted, given)
  return text, wanted, given


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
