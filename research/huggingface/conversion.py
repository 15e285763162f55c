"""FIXME: say what this module is."""

import importlib.util
import inspect
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from research.core import gin_reader
from research.core.errors import UserError, did_you_mean
from research.huggingface.fields import Family
from research.huggingface.files import FILE_BYTES, Tensors, write_tensors
from research.huggingface.names import Tensor


def family_of(config: dict[str, Any]) -> Family:
  """The row for this config.json.

  Raises:
    UserError: no such family, or one of its options that is not supported, by name.
  """
  from research.huggingface.families import FAMILIES

  kind = config.get('model_type', '')
  rows = [family for family in FAMILIES if family.model_type == kind]
  if not rows:
    known = {family.model_type for family in FAMILIES}
    raise UserError(f'config.json: no family for model_type {kind!r}.{did_you_mean(kind, known)}')
  for family in rows:
    wrong = {k: v for k, v in family.when.items() if k in config and config[k] != v}
    if not wrong:
      return family
  key, value = next(iter(wrong.items()))
  raise UserError(
    f'config.json: {kind} with {key} = {config[key]!r} is not supported, only {value!r}.'
  )


def gin_text(family: Family, config: dict[str, Any]) -> str:
  """A gin file for the model of a config.json: the family's, and the values."""
  from research.huggingface.fields import Raw

  bindings = {}
  for field in family.fields:
    bindings.update(field.read(config))
  mentions = ' '.join(f'{k} {v if isinstance(v, Raw) else ""}' for k, v in bindings.items())
  named = re.findall(r'(?:^|[@/( ])(\w+)\.', mentions)
  modules = sorted({name for name in named if importlib.util.find_spec(f'research.model.{name}')})
  lines = [f'# {family.model_type}, from config.json.', 'from __gin__ import dynamic_registration']
  lines += ['import jax.nn'] + [f'from research.model import {name}' for name in modules]
  lines += [f"include '{family.gin}'", '']
  lines += [f'{k} = {v if isinstance(v, Raw) else repr(v)}' for k, v in bindings.items()]
  return '\n'.join(lines) + '\n'


def config_json(family: Family, gin, dtype: str) -> dict[str, Any]:
  """The config.json of a gin configuration (`configs.Config`) of this family."""
  config = {'model_type': family.model_type, 'architectures': [family.architecture], 'dtype': dtype}
  for field in family.fields:
    config.update(field.write(lambda name: _value(gin, name)))
  return {**config, **family.when}


def _value(gin, name: str):
  """What a macro or a binding 'scope/module.Class.argument' is, or the argument's default."""
  if '.' not in name:
    value = gin.macros[name].value if name in gin.macros else None
  else:
    scope, _, selector = name.rpartition('/')
    module, owner, argument = selector.split('.')
    target = getattr(importlib.import_module(f'research.model.{module}'), owner)
    bound = gin.bindings.get((scope, target, argument)) or gin.bindings.get(('', target, argument))
    if bound is None:
      default = inspect.signature(
        getattr(target, '__init__', target) if inspect.isclass(target) else target
      )
      default = default.parameters[argument].default
      return None if default is inspect.Parameter.empty else default
    value = bound.value
  if isinstance(value, gin_reader.Macro):
    return _value(gin, value.name)
  return value.selector if isinstance(value, gin_reader.Reference) else value


def _family_to_write(gin, model_type: str) -> tuple[list[Tensor], dict[str, Any]]:
  """The tensors and config.json of the row that names every parameter of the model and says all that it is."""
  from research.core import configs
  from research.huggingface.families import FAMILIES

  rows = [family for family in FAMILIES if family.model_type == model_type]
  if not rows:
    known = {family.model_type for family in FAMILIES}
    raise UserError(f'--model_type: no family {model_type!r}.{did_you_mean(model_type, known)}')
  tree, error = gin.tree(), None
  for family in rows:
    try:
      wanted = table(tree, family)
      config = config_json(family, gin, 'float32')
      back = configs.Config('MODEL')
      back._read(
        gin_text(family, {**config, 'tensors': tuple(t.name for t in wanted)}), 'config.json'
      )
      _check_same(model_type, tree, back.tree())
      return wanted, config
    except UserError as e:
      error = e
  raise error


# What a config.json does not say, and inference does not need.
TRAINING_ONLY = (
  'dtype',
  'init',
  'scan',
  'remat',
  'chunk',
  'balance',
  'z_loss',
  'selection_bias',
  'capacity',
)


# Sizes that a part may compute: the shapes of the parameters are compared instead.
FROM_SHAPES = ('inner', 'rank', 'heads')


def _check_same(model_type: str, ours, theirs) -> None:
  from flax import nnx

  from research.core import describe
  from research.model import counts

  shapes = [
    {path: x.shape for path, x in nnx.to_flat_state(nnx.state(counts.abstract(tree)))}
    for tree in (ours, theirs)
  ]
  for path, shape in shapes[0].items():
    if shapes[1].get(path) != shape:
      name = '.'.join(map(str, path))
      raise UserError(
        f'config.json of {model_type} cannot say that {name} is {shape}, only {shapes[1].get(path)}.'
      )

  lines = [
    [
      line.strip()
      for line in describe.describe(tree).splitlines()
      if line.split()[0] not in (*TRAINING_ONLY, *FROM_SHAPES)
    ]
    for tree in (ours, theirs)
  ]
  for a, b in zip(*lines, strict=False):
    numbers = [re.split(r' = ', line)[-1] for line in (a, b)]
    try:
      if a != b and abs(float(numbers[0]) / float(numbers[1]) - 1) > 1e-6:
        raise ValueError
    except (ValueError, ZeroDivisionError):
      raise UserError(
        f'config.json of {model_type} cannot say {a!r} of this model, only {b!r}.'
      ) from None


def table(model, family: Family) -> list[Tensor]:
  """The tensors of this family for a model (a partial that needs only `rngs`).

  Raises:
    UserError: the table leaves a parameter out, by name.
  """
  from flax import nnx

  from research.huggingface import names as names_module
  from research.model import counts

  module = counts.abstract(model)
  tensors = names_module.tensors(module, family.trees, family.top)
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


def _open(folder: pathlib.Path) -> tuple[str, list[Tensor], Tensors]:
  """A Hugging Face checkpoint's gin text, the tensors that its model wants, and those there."""
  from research.core import configs

  if not (folder / 'config.json').is_file():
    raise UserError(f'{folder}: no config.json here (a folder of a downloaded model is wanted).')
  config = json.loads((folder / 'config.json').read_text())
  given = Tensors(folder)
  family = family_of(config)
  text = gin_text(family, {**config, 'tensors': tuple(given)})
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')
  wanted = table(gin.tree(), family)
  _check_names(folder, wanted, given, family.ignore)
  return text, wanted, given


def _pieces(wanted, given) -> Iterator[tuple[tuple, tuple[int, ...], np.ndarray]]:
  for tensor in wanted:
    for piece, value in zip(tensor.pieces, tensor.split(given[tensor.name]), strict=True):
      yield piece.path, piece.index, value


def _shapes(wanted) -> dict[tuple, tuple[int, ...]]:
  """The shape of every parameter, whose pieces have one index on each of the leading axes."""
  indices: dict[tuple, list] = {}
  for piece in (piece for tensor in wanted for piece in tensor.pieces):
    indices.setdefault(piece.path, []).append((piece.index, piece.shape))
  return {
    path: (*(max(i) + 1 for i in zip(*(index for index, _ in found), strict=True)), *found[0][1])
    for path, found in indices.items()
  }


def load(folder: str | pathlib.Path) -> tuple[str, dict]:
  """The gin text and the parameters (nested dicts, in memory) of a Hugging Face checkpoint.

  Args:
    folder: with config.json and *.safetensors.

  Raises:
    UserError: an unknown family or option; tensors that are unknown, missing or misshapen, listed.
  """
  from research.checkpoints import streamed

  text, wanted, given = _open(pathlib.Path(folder))
  arrays = {path: np.empty(shape, np.float32) for path, shape in _shapes(wanted).items()}
  for path, index, value in _pieces(wanted, given):
    arrays[path][index] = value
  return text, streamed.nested(arrays)


def from_hf(folder: str | pathlib.Path, out: str | pathlib.Path) -> None:
  """Writes the checkpoint and the model.gin of a Hugging Face checkpoint, a tensor at a time.

  Raises:
    UserError: as `load`.
  """
  from research.checkpoints import streamed

  out = pathlib.Path(out)
  text, wanted, given = _open(pathlib.Path(folder))
  out.mkdir(parents=True, exist_ok=True)
  leading = {piece.path: len(piece.index) for tensor in wanted for piece in tensor.pieces}
  streamed.write_params(out, _shapes(wanted), leading, lambda: _pieces(wanted, given))
  (out / 'model.gin').write_text(text)


def _check_names(folder, wanted, given, ignore):
  names = {tensor.name for tensor in wanted}
  unknown = [n for n in given if n not in names and not any(re.fullmatch(i, n) for i in ignore)]
  # A tied head that was saved all the same says nothing new.
  unknown = [n for n in unknown if n != 'lm_head.weight']
  problems = [f'{name} is missing' for name in sorted(names - given.keys())]
  problems += [f'{name} is unknown' for name in sorted(unknown)]
  problems += [
    f'{t.name} is {given.shapes[t.name]} and should be {t.shape}'
    for t in wanted
    if given.shapes.get(t.name, t.shape) != t.shape
  ]
  if problems:
    raise UserError(f'{folder}: the tensors do not fit config.json: {"; ".join(problems)}.')


def save(
  folder: str | pathlib.Path,
  gin,
  params,
  model_type: str,
  dtype: str = 'float32',
  file_bytes: float = FILE_BYTES,
) -> None:
  """Writes config.json and *.safetensors of a model.

  Args:
    gin: the `configs.Config` whose MODEL it is.
    params: its parameters, nested dicts or a `streamed.Params`.
    model_type: the Hugging Face family to write.
    file_bytes: as in `write_tensors`.

  Raises:
    UserError: the family is unknown, or the model is something that its config.json cannot say.
  """
  wanted, config = _family_to_write(gin, model_type)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  sizes = {t.name: t.shape for t in wanted}
  write_tensors(folder, _joined(wanted, params), sizes, dtype, file_bytes)
  text = json.dumps({**config, 'dtype': dtype}, indent=2) + '\n'
  (folder / 'config.json').write_text(text)


def _joined(wanted: list[Tensor], params) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor; those that are made of the same parameters after another, so that few need be held."""
  from research.checkpoints import streamed

  def value(piece):
    if isinstance(params, streamed.Params):
      return params.piece(piece.path, piece.index)
    node = params
    for key in piece.path:
      node = node[key] if key in node else node[str(key)]
    return np.asarray(node[piece.index])

  paths = lambda tensor: [piece.path for piece in tensor.pieces]
  groups: dict[str, list] = {}
  for tensor in wanted:
    groups.setdefault(str(paths(tensor)), []).append(tensor)
  for group in groups.values():
    for tensor in group:
      yield tensor.name, tensor.join([value(piece) for piece in tensor.pieces])
    if isinstance(params, streamed.Params):
      params.forget()
