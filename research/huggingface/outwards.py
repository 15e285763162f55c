"""Writes our models as Hugging Face checkpoints: config.json and tensors, a tensor at a time.

Before anything is written, the new config.json is read back into gin, and the model that it describes is
compared with the given one (`likeness`). So what a family cannot express is refused, and never dropped.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from research.core.errors import UserError, did_you_mean
from research.huggingface.companions import write_companions
from research.huggingface.fields import Family, Options
from research.huggingface.files import FILE_BYTES, write_tensors
from research.huggingface.inwards import NONSENSE, gin_text, table, unlike
from research.huggingface.likeness import check_same
from research.huggingface.names import Tensor
from research.huggingface.resolved import Resolved
from research.huggingface.settings import Settings


def config_json(family: Family, tree, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a resolved model in the keys of this family."""
  config = {'model_type': family.model_type, 'architectures': [family.architecture], 'dtype': dtype}
  get = Resolved(tree, sublayers=len(family.trees[0].norms))
  for field in family.fields:
    config.update(field.write(get))
  fixed = {k: v[0] if isinstance(v, Options) else v for k, v in family.when.items()}
  return {**fixed, **config}


def family_to_write(gin, model_type: str) -> tuple[list[Tensor], dict[str, Any]]:
  """Returns the tensors and the config.json of the first row of a family that describes the model in full.

  Args:
    gin: the `configs.Config` whose MODEL is written.
    model_type: of the family.

  Raises:
    UserError: no row does; the message is about the first one.
  """
  from research.huggingface.families import FAMILIES

  rows = [family for family in FAMILIES if family.model_type == model_type]
  if not rows:
    families = {family.model_type for family in FAMILIES}
    raise UserError(f'--model_type: no family {model_type!r}.{did_you_mean(model_type, families)}')
  tree = gin.tree()
  reason = None
  for family in rows:
    try:
      return _as_written(tree, family)
    except UserError as error:
      reason = reason or error
    except NONSENSE as error:
      reason = reason or UserError(
        f'{model_type} has no config.json for this model: {type(error).__name__}: {error}.'
      )
  raise reason


def _as_written(tree, family: Family) -> tuple[list[Tensor], dict[str, Any]]:
  """The tensors and the config.json of a model in one row, if reading them back gives the same model."""
  from research.core import configs

  wanted = table(tree, family)
  config = config_json(family, tree, 'float32')
  tensors = frozenset(tensor.name for tensor in wanted)
  settings = Settings(config, family.model_type, tensors=tensors)
  if key := unlike(family, settings):
    raise UserError(
      f'{family.model_type} with {key} = {settings.get(key)!r} cannot be written for this model.'
    )
  text = gin_text(family, settings)
  back = configs.Config('MODEL')
  back._read(text, 'config.json')
  check_same(family.model_type, tree, back.tree())
  return wanted, config


def save(
  folder: str | pathlib.Path,
  gin,
  params,
  model_type: str,
  dtype: str = 'float32',
  file_bytes: float = FILE_BYTES,
  source: pathlib.Path | None = None,
) -> None:
  """Writes config.json, safetensors and, where it is known, the tokenizer of a model.

  Args:
    folder: to write into.
    gin: the `configs.Config` whose MODEL is written.
    params: its parameters, nested dicts or a `streamed.Params`.
    model_type: the Hugging Face family to write.
    dtype: of the tensors.
    file_bytes: as in `write_tensors`.
    source: a converted checkpoint or a run's folder, whose tokenizer and special ids are written too.

  Raises:
    UserError: the family is unknown, or its config.json cannot describe the model.
  """
  wanted, config = family_to_write(gin, model_type)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  sizes = {tensor.name: tensor.shape for tensor in wanted}
  write_tensors(folder, _joined(wanted, params), sizes, dtype, file_bytes)
  config |= write_companions(folder, source, config['vocab_size'])
  text = json.dumps({**config, 'dtype': dtype}, indent=2) + '\n'
  (folder / 'config.json').write_text(text)


def _joined(wanted: list[Tensor], params) -> Iterator[tuple[str, np.ndarray]]:
  """Yields every tensor. Those of the same parameters follow each other, so that few are in memory."""
  from research.checkpoints import streamed

  def value(piece):
    if isinstance(params, streamed.Params):
      return params.piece(piece.path, piece.index)
    node = params
    for key in piece.path:
      node = node[key] if key in node else node[str(key)]
    return np.asarray(node[piece.index])

  groups: dict[str, list] = {}
  for tensor in wanted:
    groups.setdefault(str([piece.path for piece in tensor.pieces]), []).append(tensor)
  for group in groups.values():
    for tensor in group:
      yield tensor.name, tensor.join([value(piece) for piece in tensor.pieces])
    if isinstance(params, streamed.Params):
      params.forget()
