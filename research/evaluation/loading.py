"""A trained model from its folder: what it is, its parameters, its tokenizer.

The folder is a run's (config.gin and checkpoints/) or a converted one's (model.gin and a checkpoint).
"""

import dataclasses
import math
import pathlib

import jax
from flax import nnx

from research.checkpoints import pretrained, streamed
from research.checkpoints.pretrained import abstract_model
from research.core import configs
from research.core.errors import UserError
from research.data.vocabularies import Vocabulary
from research.parallel.mesh import Mesh
from research.training.run import Run


@dataclasses.dataclass(frozen=True)
class Folder:
  """What a folder says of a model, before any of its parameters are read.

  Attributes:
    model: makes it: `model(rngs=...)`.
    run: the run that trained it; None for a converted model.
    params: its newest checkpoint's.
  """

  path: pathlib.Path
  model: object
  run: Run | None
  params: streamed.Params

  @property
  def step(self) -> int:
    """The step of the checkpoint."""
    return self.params.step


def open_folder(path: str | pathlib.Path) -> Folder:
  """Reads what a folder's model is.

  Raises:
    UserError: it holds no model, or no checkpoint.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'--checkpoint={path}: there is no such folder.')
  if (path / 'config.gin').is_file():
    run = configs.load(str(path / 'config.gin')).build()
    return Folder(path, run.model, run, streamed.Params(path))
  if (path / 'model.gin').is_file():
    model = configs.load(str(path / 'model.gin'), root='MODEL').tree()
    return Folder(path, model, None, streamed.Params(path))
  raise UserError(
    f'--checkpoint={path} holds no config.gin (of a run) and no model.gin (of a converted model).'
  )


def read_params(folder: Folder) -> dict:
  """The parameters, on the mesh in use; the optimizer's state is not read.

  Raises:
    UserError: a parameter is missing, has another shape, or does not match its checksum.
  """
  return pretrained.read_params(folder.model, folder.params)


def vocabulary_of(run: Run | None) -> Vocabulary:
  """The vocabulary that a run trained with.

  Raises:
    UserError: there is no run, or its streams are a registered task's.
  """
  stream = _first_stream(run) if run else None
  if stream is None or stream.registered:
    raise UserError('the checkpoint does not say its tokenizer: bind Suite.vocabulary.')
  return stream.vocabulary


def architecture_of(run: Run | None, model: nnx.Module) -> str:
  """One of `rows.ARCHITECTURES`, by the model and by what it was trained on.

  Raises:
    UserError: an encoder has no likelihood of a text.
  """
  if 'encoder' in model.inputs:
    return 'encoder_decoder'
  if not model.causal:
    raise UserError(
      'this model sees both ways, so it gives no likelihood of a text: evaluate a decoder or an '
      'encoder-decoder.'
    )
  stream = _first_stream(run) if run else None
  if stream is None or stream.registered or not stream.task.prefixed:
    return 'decoder'
  return 'prefix'


def _first_stream(run: Run):
  streams = getattr(run.train, 'streams', None)
  return next(iter(streams.values())) if isinstance(streams, dict) else run.train


def length_of(run: Run | None) -> int:
  """The longest row that a run trained on; for a converted model, 1024."""
  return max(run.train.lengths.values()) if run else 1024


def mesh_for(model) -> Mesh:
  """Data parallel; parameters that would fill a device are split over all of them."""
  devices = jax.devices()
  with Mesh().use(devices[:1]):  # shapes are asked for under some mesh
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract_model(model))))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  memory = (devices[0].memory_stats() or {}).get('bytes_limit')
  return Mesh(data=1, fsdp=-1) if memory and size > 0.5 * memory else Mesh()
