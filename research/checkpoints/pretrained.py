"""A trained model that something else reads: a teacher, a reference, or the model of an evaluation.

Its folder is that of a run (config.gin and checkpoints/) or of a converted model (model.gin and a checkpoint).
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
  """Reads a model's parameters onto the mesh in use. The optimizer's state is not read.

  Args:
    model: `model(rngs=...)` makes the model.
    params: the parameters of its checkpoint.

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
        f'{params.folder}: {name} is {value.shape} in the checkpoint and {wanted.shape} in the model; check '
        'that its gin file belongs to the checkpoint.'
      )
    total = expected.get(f'params/{name}')
    if total is not None and partial_checksum(np.ascontiguousarray(value), 0) != total:
      raise UserError(
        f'{params.folder}: the checkpoint at step {params.step} is damaged ({name}); delete it to use '
        'the one before it.'
      )
    arrays.append(jax.device_put(value.astype(wanted.dtype), wanted.sharding))
    params.forget()  # so that the host never has more than one parameter twice
  return jax.tree.unflatten(treedef, arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A model with its parameters, which do not learn. It is a field of losses and of the scores of a stream.

  Attributes:
    folder: the folder of a run, or of a model that `research.convert` wrote.
    step: the step of the checkpoint; None for the newest.
  """

  folder: str
  step: int | None = None

  def described(self) -> dict:
    """Returns its part of a run's identity: the content of the checkpoint, and not its folder."""
    return {'step': self.checkpoint.step, 'signature': self.signature}

  @functools.cached_property
  def checkpoint(self) -> streamed.Params:
    """The parameters on disk.

    Raises:
      Invalid: there is no checkpoint, or none of that step.
    """
    try:
      return streamed.Params(self.folder, self.step)
    except UserError as error:
      raise Invalid(type(self), 'folder', str(error)) from None

  @property
  def signature(self) -> str:
    """A digest that differs if any parameter does."""
    return self.checkpoint.signature

  @functools.cached_property
  def model(self):
    """The factory of the model: `model(rngs=...)`.

    Raises:
      Invalid: the folder has no gin file of its model.
    """
    folder = pathlib.Path(self.folder)
    if (folder / 'model.gin').is_file():
      return configs.load(str(folder / 'model.gin'), root='MODEL').tree()
    if (folder / 'config.gin').is_file():
      # The tree and not the run: building the run would need the teacher's data, which may be gone.
      return configs.load(str(folder / 'config.gin')).tree().keywords['model']
    why = f'{self.folder} has no config.gin (of a run) and no model.gin (of a converted model).'
    raise Invalid(type(self), 'folder', why)

  @functools.cached_property
  def abstract(self) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return abstract_model(self.model)

  def shapes(self) -> dict:
    """Returns the shapes and shardings of the parameters under the mesh in use."""
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
    figures = {k: v for k, v in row.items() if k.startswith('params_') or k in ('tokens', 'loss')}
    return {'signature': self.signature, **figures}
