"""A whole trained model that something else reads: a teacher, a reference, what is evaluated.

Its folder is a run's (config.gin and checkpoints/) or a converted model's (model.gin and a checkpoint).
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
from flax import nnx

from research.checkpoints import streamed
from research.checkpoints.manager import partial_checksum
from research.core import configs
from research.core.errors import Invalid, UserError
from research.model.parameters import abstract_model
from research.parallel import hosts


def read_params(model, params: streamed.Params) -> dict:
  """A model's parameters, on the mesh in use; the optimizer's state is not read.

  Args:
    model: makes it: `model(rngs=...)`.
    params: of its checkpoint.

  Raises:
    UserError: a parameter is missing, has another shape, or does not match its checksum.
  """
  where = hosts.on_mesh(nnx.to_pure_dict(nnx.state(abstract_model(model))))
  expected = params.checksums()
  leaves, treedef = jax.tree.flatten_with_path(where)
  arrays = []
  for path, wanted in leaves:
    keys = tuple(key.key for key in path)
    name = '/'.join(map(str, keys))
    value = np.asarray(params.piece(keys, ()))
    if value.shape != wanted.shape:
      raise UserError(
        f'{params.folder}: {name} is {value.shape} in the checkpoint, and {wanted.shape} in the model.'
      )
    total = expected.get(f'params/{name}')
    if total is not None and partial_checksum(np.ascontiguousarray(value), 0) != total:
      raise UserError(
        f'{params.folder}: the checkpoint at step {params.step} is damaged ({name}); delete it to use '
        'the one before it.'
      )
    arrays.append(jax.device_put(value.astype(wanted.dtype), wanted.sharding))
    params.forget()
  return jax.tree.unflatten(treedef, arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A model with its parameters, which do not learn: a field of a loss or of what is frozen beside a stream.

  Attributes:
    folder: of a run of ours, or of a model that `research.convert` wrote.
    step: of the checkpoint; None for the newest.
  """

  folder: str
  step: int | None = None

  def described(self) -> dict:
    """What stands in a run's identity: what the checkpoint holds, and not where it lies."""
    return {'step': self.checkpoint.step, 'signature': self.signature}

  @functools.cached_property
  def checkpoint(self) -> streamed.Params:
    """Its parameters on disk.

    Raises:
      Invalid: there is no checkpoint, or none of that step.
    """
    try:
      return streamed.Params(self.folder, self.step)
    except UserError as error:
      raise Invalid(type(self), 'folder', str(error)) from None

  @property
  def signature(self) -> str:
    """Differs when any parameter does."""
    return self.checkpoint.signature

  @functools.cached_property
  def model(self):
    """Makes the model: `model(rngs=...)`.

    Raises:
      Invalid: the folder does not say what its model is.
    """
    folder = pathlib.Path(self.folder)
    if (folder / 'model.gin').is_file():
      return configs.load(str(folder / 'model.gin'), root='MODEL').tree()
    if (folder / 'config.gin').is_file():
      # The tree and not the run: the teacher's own data need not be here any more.
      return configs.load(str(folder / 'config.gin')).tree().keywords['model']
    why = f'{self.folder} holds no config.gin (of a run) and no model.gin (of a converted model).'
    raise Invalid(type(self), 'folder', why)

  @functools.cached_property
  def abstract(self) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return abstract_model(self.model)

  def shapes(self) -> dict:
    """Of its parameters, and where they live under the mesh in use."""
    return nnx.to_pure_dict(nnx.state(abstract_model(self.model)))

  def params(self) -> dict:
    """Its parameters on the mesh in use.

    Raises:
      UserError: the checkpoint is damaged, or of another model than its folder says.
    """
    return read_params(self.model, self.checkpoint)

  def row(self) -> dict:
    """N, D and the loss of the run that trained it, for the row of the run that reads it."""
    path = pathlib.Path(self.folder) / 'run.json'
    row = json.loads(path.read_text()) if path.is_file() else {}
    kept = {k: v for k, v in row.items() if k.startswith('params_') or k in ('tokens', 'loss')}
    return {'signature': self.signature, **kept}
